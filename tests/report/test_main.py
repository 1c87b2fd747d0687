import json

import pytest

from granq_jax.report.__main__ import main
from tests.report.run_files import write_run


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "a")
    write_run(root / "b", finished=False, seed=1)
    return root / "a", root / "b"


@pytest.mark.slow
def test_a_run_that_is_not_finished_has_a_report(workdirs, capsys):
    assert main([str(workdirs[1])]) == 0
    page = (workdirs[1] / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(workdirs[1] / "report.html")
    assert "unfinished: step 20 of 20" in page
    assert "Student, after step 20" in page
    assert "87.50" in page


def test_several_runs(workdirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(workdir) for workdir in workdirs]) == 0
    page = (tmp_path / "comparison.html").read_text()
    assert "2 runs side by side" in page
    assert main([str(workdirs[0]), "--output", "one.html"]) == 0
    assert (tmp_path / "one.html").exists()
    assert not (workdirs[0] / "report.html").exists()


def test_a_line_cut_off_by_a_kill_does_no_harm(tmp_path):
    write_run(tmp_path / "run", finished=False)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert main([str(tmp_path / "run")]) == 0


def test_a_run_of_which_nothing_can_be_read(tmp_path, capsys):
    workdir = tmp_path / "run"
    write_run(workdir)
    (workdir / "result.json").write_text("[]")
    assert main([str(workdir)]) == 2
    assert "result.json' is damaged" in capsys.readouterr().err
    for path in (workdir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert main([str(workdir)]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["workdir", "'nowhere'", "no run"]),
        (["empty"], ["workdir", "'empty'", "no checkpoint"]),
        (["empty", "--output=missing/a.html"], ["--output", "'missing/a.html'", "directories that exist"]),
        (["empty", "--output=empty"], ["--output", "'empty'"]),
        (["moved"], ["config.teacher", "gone.safetensors"]),
        (["untrained"], ["config.teacher", "'train'", "'untrained'"]),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, words, tmp_path, monkeypatch, capsys, workdirs):
    monkeypatch.chdir(tmp_path)
    settings = json.loads((workdirs[0] / "config.json").read_text())
    for name, teacher in (("empty", "bundled"), ("moved", "gone.safetensors"), ("untrained", "train")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({**settings, "teacher": teacher}))
        if name != "empty":
            (tmp_path / name / "checkpoints").symlink_to(workdirs[0] / "checkpoints")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error
    assert not list(tmp_path.rglob("*.html"))

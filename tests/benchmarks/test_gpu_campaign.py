"""The GPU campaign runs to its end where there is no GPU, and reads off a GPU's trace what is there."""

import csv
import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
TABLES = ("machine", "correctness", "bandwidth", "tuning", "steps", "operations", "runs", "imagenet")
# Two streams of a GPU, and beside them a line that holds the same events again.
TRACE = """
planes {
  name: "/device:GPU:0"
  event_metadata { key: 1 value { id: 1 name: "fake_quant_sample_channel" } }
  event_metadata { key: 2 value { id: 2 name: "loop_fusion" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_module" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_op" } }
  lines {
    name: "Stream #13(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000 stats { metadata_id: 1 str_value: "jit_ours" } }
    events { metadata_id: 1 offset_ps: 4000000 duration_ps: 3000000 stats { metadata_id: 1 str_value: "jit_ours" } }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 9000000 stats { metadata_id: 1 str_value: "jit_ours" } }
  }
  lines {
    name: "Stream #14(Compute)"
    timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 1000000 duration_ps: 4000000 }
  }
  lines {
    name: "XLA Ops"
    timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 2000000 stats { metadata_id: 1 str_value: "jit_ours" } }
  }
}
planes {
  name: "/host:CPU"
  event_metadata { key: 1 value { id: 1 name: "on the host" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_op" } }
  lines { name: "thread" events { metadata_id: 1 duration_ps: 1 stats { metadata_id: 2 str_value: "f" } } }
}
"""


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def benchmark(name):
    return importlib.import_module(name)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_only_the_streams_of_a_gpu_count():
    common = benchmark("gpu_common")
    profile = jax.profiler.ProfileData.from_text_proto(TRACE)
    events = common.events_of(profile)
    assert [event.name for event in events] == ["fake_quant_sample_channel", "loop_fusion"] + [
        "fake_quant_sample_channel"
    ] * 2
    assert [event.module for event in events] == ["jit_ours", "", "jit_ours", "jit_ours"]
    assert [round(1e6 * event.seconds) for event in events] == [2, 4, 3, 9]
    assert common.busy_seconds(events) == pytest.approx((7 + 9) * 1e-6)


def test_a_program_is_timed_by_its_own_events(monkeypatch):
    common = benchmark("gpu_common")
    profile = jax.profiler.ProfileData.from_text_proto(TRACE)
    monkeypatch.setattr(common, "traced", lambda run: [run(), *common.events_of(profile)][1:])
    programs = [common.Program(name, jnp.negative, [(jnp.ones(3),)]) for name in ("ours", "theirs")]
    timings = common.timed(programs, 3)
    assert (timings["ours"].seconds, timings["ours"].launches) == (pytest.approx(3e-6), 1)  # the median
    assert [timings[name].clock for name in ("ours", "theirs")] == ["device", "host"]
    assert timings["theirs"].seconds > 0


def test_a_table_is_on_disk_row_by_row(tmp_path):
    table = benchmark("gpu_common").Table(tmp_path / "t.csv", ["a", "b"])
    table.add(a=1 / 3)
    assert (tmp_path / "t.csv").read_text() == "a,b,error\n0.33333,,\n"
    table.add(a=2, error="it\nfailed")
    assert read(tmp_path / "t.csv")[1] == {"a": "2", "b": "", "error": "it\nfailed"}
    with pytest.raises(ValueError, match="c"):
        table.add(c=1)


def judged(case, outputs, *arguments):
    correctness = benchmark("gpu_correctness")
    with jax.enable_x64(True):
        return [float(v) for v in correctness.judged(case, jax.tree.map(jnp.asarray, outputs), *arguments)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_judge_accepts_the_reference_and_sees_what_is_wrong(dtype):
    cases, correctness = benchmark("gpu_cases"), benchmark("gpu_correctness")
    for case in [case for case in cases.ragged() if case.dtype == dtype and math.prod(case.shape) < 2000]:
        arguments = [jnp.asarray(value) for value in correctness.inputs(case)]
        outputs = jax.device_get(cases.xla_form(case)(*arguments))
        other, worst, not_finite = judged(case, outputs, *arguments)
        assert (other, not_finite) == (0, 0), case
        assert worst <= 0.01
        # One element, in the last channel of the last sample, a code further; and then none at all.
        if case.what == "quantize" or case.array[1] == 1:
            continue
        wrong = np.array(outputs)
        channel = wrong.reshape(case.array)[-1, :, -1]
        levels = np.unique(channel.astype(np.float32))
        channel[0] = levels[1] if channel[0] == levels[0] else levels[0]
        other, worst, _ = judged(case, wrong, *arguments)
        assert other == 1, case
        assert worst > 0.5
        channel[0] = np.nan
        assert judged(case, wrong, *arguments)[2] == 1


def test_gradients_of_the_judge_are_those_of_the_formula():
    cases, correctness = benchmark("gpu_cases"), benchmark("gpu_correctness")
    case = next(case for case in cases.ragged() if case.residual and case.dtype == "float32")
    x, norm, residual = (jnp.asarray(value) for value in correctness.inputs(case))
    x = jnp.where(jnp.isfinite(x), x, 0.5)
    cotangent = jnp.ones_like(x)
    exact, ours = (correctness._gradient(case, impl, x, norm, cotangent, residual) for impl in (None, "xla"))
    for a, b in zip(exact, ours, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("fake_quant_sample_channel", "quantizer"),
        ("MemcpyD2D", "copy"),
        ("sm90_xmma_fprop_implicit_gemm_tf32f32", "convolution"),
        ("nvjet_tst_128x128", "matrix product"),
        ("input_reduce_fusion_3", "reduction"),
        ("loop_multiply_fusion", "element-wise"),
        ("something", "other"),
    ],
)
def test_kinds_of_launches(name, kind):
    assert benchmark("gpu_steps").kind_of(name) == kind


def test_the_floor_of_a_step_is_the_longer_of_bytes_and_products(tmp_path):
    page = benchmark("gpu_page")
    (tmp_path / "machine.csv").write_text(
        "what,value,unit,clock,error\ncopy of 8 MB,1000,GB/s,device,\ncopy of 64 MB,2000,GB/s,device,\n"
        '"matrix product, float32 at tensorfloat32",100,TFLOP/s,device,\n'
    )
    rates = page.rates(tmp_path)
    row = {"precision": "tf32", "moved_gb": "4", "gflop": "100"}
    assert page.floor_ms(row, rates) == pytest.approx(2.0)
    assert page.floor_ms(row | {"gflop": "400"}, rates) == pytest.approx(4.0)
    assert page.floor_ms(row | {"moved_gb": ""}, rates) is None
    assert page.floor_ms(row | {"precision": "float32"}, rates) is None


def test_tables_of_several_goes_make_one_page(tmp_path):
    page = benchmark("gpu_page")
    columns = benchmark("gpu_steps").COLUMNS
    for name, network in (("steps", "resnet18"), ("steps_2", "resnet50")):
        table = benchmark("gpu_common").Table(tmp_path / f"{name}.csv", columns)
        table.add(network=network, batch=16, precision="tf32", side="kernels", ms=2.0, launches=700.0)
        table.add(network=network, batch=16, precision="tf32", side="PyTorch compiled", error="no | compiler\nhere")
    text = page.page(tmp_path)
    assert "| resnet18 | 16 | tf32 | kernels | 2.00 |" in text
    assert "compiler" not in text  # what failed is said when its part ends, and in the file
    assert "| resnet50 | 16 | tf32 | PyTorch compiled | failed: no / compiler here |" in page.of_part("d", tmp_path)
    assert text.count("Not measured.") == 2  # correctness and bandwidth
    between = f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n"
    put = page.put_into(between, text)
    assert text in put
    assert "old" not in put
    assert page.put_into(put, text) == put


def test_the_summary_that_is_kept_is_that_of_the_tables():
    page = benchmark("gpu_page")
    kept = (ROOT / "docs" / "gpu.md").read_text()
    assert kept == page.put_into(kept, page.page(ROOT / "results" / "gpu"))


def missing_peer():
    import pytorchcv_that_is_not_there  # noqa: F401


def without_pytorch():
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


def exits():
    os._exit(3)


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (without_pytorch, "pip install -e '.[parity]'"),
        (missing_peer, "pytorchcv_that_is_not_there"),
        (exits, "its process ended with status 3"),
    ],
)
def test_a_benchmark_whose_other_side_cannot_run_says_so_in_a_line(prepare, words):
    turns = benchmark("turns")
    with pytest.raises(SystemExit) as caught:
        turns.measure_in_turns({"peer": (prepare, ())}, 1)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_runs_are_parsed():
    runs = benchmark("gpu_runs")
    assert runs.parsed("cifar10_w3a3,seed=1,quant.impl=xla") == runs.Run(
        "cifar10_w3a3", {"seed": "1", "quant.impl": "xla"}
    )
    assert runs.parsed("digits_w2a2") == runs.Run("digits_w2a2", {})


def test_a_part_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    campaign = benchmark("gpu_campaign")
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\nprint('left out: all', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(campaign, "__file__", str(sleeper))
    monkeypatch.setattr(campaign, "GRACE", 0.1)
    how, left_out = campaign.start_part("a", 2.0, SimpleNamespace(rehearse=True), [])
    assert how == "was ended: it took too long"
    assert left_out == ["all"]


@pytest.mark.slow
def test_the_rehearsal(tmp_path):
    command = [
        sys.executable,
        "benchmarks/gpu_campaign.py",
        "--minutes=30",
        "--rehearse",
        "--tune",
        f"--out={tmp_path}",
    ]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=1800)
    assert [(row["part"], row["how"]) for row in read(tmp_path / "plan.csv")] == [(part, "ran") for part in "abcdef"]
    peers = all(importlib.util.find_spec(name) for name in ("torch", "pytorchcv"))
    for name in TABLES:
        rows = read(tmp_path / f"{name}.csv")
        assert rows, name
        errors = [row for row in rows if row["error"] and row.get("what") != "nvidia-smi"]
        if not peers:
            errors = [row for row in errors if "PyTorch" not in row.get("side", "")]
        assert not errors
    assert all(row["passed"] == "True" for row in read(tmp_path / "correctness.csv"))
    assert {row["side"] for row in read(tmp_path / "steps.csv")} >= {"kernels", "PyTorch channels_first"}
    assert "Not measured." not in (tmp_path / "summary.md").read_text()

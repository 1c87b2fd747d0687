import base64
import io
import re

import numpy as np
import PIL.Image
import pytest

from granq_jax.config import make_trainer
from granq_jax.data.datasets import DATASETS
from granq_jax.quant import quantize
from granq_jax.quant.sites import Site
from granq_jax.report import comparison_page, image_grid, read_run, run_page
from granq_jax.report.page import loss_charts
from tests.quant.reference import fake_quant
from tests.report.pages import Page, check_self_contained
from tests.report.run_files import write_run

EVIL = '<script>alert("1")</script>&'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(run, its config, teacher and state) of a run whose texts try to break out."""
    workdir = tmp_path_factory.mktemp("runs") / "a<b>'c"
    config, teacher, state = write_run(workdir, command=f"python -m granq_jax.main {EVIL}", data_dir=EVIL)
    return read_run(workdir), config, teacher, state


@pytest.fixture(scope="module")
def page(made):
    return check_self_contained(run_page(made[0]))


def test_texts_cannot_break_out(made, page):
    html = run_page(made[0])
    assert "<script" not in html
    assert "a<b>" not in html
    assert page.text.count(EVIL) == 2  # the command and data_dir, as they were given
    assert str(made[0].workdir) in page.text


def test_every_site_has_a_row_with_its_numbers(made, page):
    run, config, teacher, _ = made
    trainer = make_trainer(config)
    images = run.inspection.images.reshape(-1, 8, 8, 1)
    sites = quantize(trainer.model, trainer.spec).sites(teacher, images, train=False)
    for kind, label in (("weight", "Weights"), ("activation", "Activations")):
        _, *rows = page.tables[label]
        expected = [site for site in sites if site.kind == kind]
        assert [row[0] for row in rows] == [site.path for site in expected]
        for row, site in zip(rows, expected, strict=True):
            shape = site.shape if kind == "weight" else site.shape[1:]
            assert row[1] == " \u00d7 ".join(map(str, shape))
            assert row[2] == "3"
            assert row[4] == f"{site.effective_bits:.2f}"


def test_errors_and_levels_of_weights_equal_a_computation_in_numpy(made, page):
    _, _, teacher, state = made
    _, *rows = page.tables["Weights"]
    total = np.zeros(8)
    for row in rows:
        weight, original = state.student["params"], teacher["params"]
        for name in row[0].split("/"):
            weight, original = weight[name], original[name]
        weight, original = (np.asarray(tree["kernel"], np.float64) for tree in (weight, original))
        codes, values = fake_quant(weight, 3, "out_channel")
        assert float(row[5]) == pytest.approx(100 * np.linalg.norm(values - weight) / np.linalg.norm(weight), abs=0.01)
        assert float(row[6]) == pytest.approx(
            100 * np.linalg.norm(values - original) / np.linalg.norm(original), abs=0.01
        )
        assert row[7] == f"{len(np.unique(codes))} of 8"
        total += np.bincount((codes + 4).astype(int).ravel(), minlength=8)
    (label,) = [a["aria-label"] for tag, a in page.elements if a.get("aria-label", "").startswith("Weights, 3 bits")]
    shares = [float(number) for number in re.findall(r"\d+\.\d", label)]
    assert shares == pytest.approx(100 * total / total.sum(), abs=0.06)


def test_the_result_the_curves_and_what_it_takes_to_repeat_it(made, page):
    run = made[0]
    rows = page.tables["Accuracy"]
    assert rows[0][0] == "On 360 test images"
    assert [row[1:] for row in rows[1:]] == [["95.00", "99.00"], ["70.00", "99.00"], ["87.50", "99.00"], ["88.12", ""]]
    assert "picked on the test set" in rows[-1][0]
    charts = [a["aria-label"] for tag, a in page.elements if tag == "svg" and "over steps" in a.get("aria-label", "")]
    assert len(charts) == 6
    for loss, last in (("loss_g", "0.05"), ("loss_s", "-20"), ("hinge", "0.1"), ("onehot", "2"), ("bns", "3")):
        assert any(f"({loss})" in chart and chart.endswith(f"last: {last}") for chart in charts)
    assert charts[0].endswith("last: student 87.5")
    settings = {row[0]: row[1] for row in page.tables["Settings"]}
    assert settings["quant.weight_bits"] == "3"
    assert settings["epochs"] == "2"
    for version in run.starts[0]["versions"].values():
        assert version in page.text
    assert "Seed 0" in page.text


def test_what_stays_in_full_precision_is_said(made, page):
    params = made[3].student["params"]
    _, *rows = page.tables["What was not quantized"]
    biases = params["head"]["bias"].size
    assert int({row[0]: row[2] for row in rows}["bias"].replace(",", "")) > biases
    assert [row[0] for row in rows] == ["bias", "scale"]
    _, *storage = page.tables["Storage"]
    sizes = [int(row[1].replace(",", "")) for row in storage]
    weights = sum(int(np.prod([int(n) for n in row[1].split(" \u00d7 ")])) for row in page.tables["Weights"][1:])
    outputs = sum(int(row[1].split(" ")[-1]) for row in page.tables["Weights"][1:])
    assert sizes[:3] == [weights * 3 // 8, 4 * outputs, 4 * outputs]
    assert sizes[4] == 4 * weights + sizes[3]
    shapes = [[int(n) for n in row[1].split(" \u00d7 ")] for row in page.tables["Activations"][1:]]
    elements, channels = sum(int(np.prod(shape)) for shape in shapes), sum(shape[-1] for shape in shapes)
    assert sizes[5:] == [elements * 3 // 8, 4 * channels, 4 * channels, 0, 4 * elements]


def test_images_are_the_generators_by_class(made, page):
    run = made[0]
    images = [a for tag, a in page.elements if tag == "img"]
    assert [a["alt"] for a in images] == [f"generated images of class {label}" for label in range(10)]
    encoded = images[3]["src"].removeprefix("data:image/png;base64,")
    pixels = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(encoded))))
    assert pixels.shape == (8, 8 * 9 - 1)
    raw = run.inspection.images[3, 2, ..., 0] * DATASETS["digits"].std[0] + DATASETS["digits"].mean[0]
    np.testing.assert_allclose(pixels[:, 18:26], 255 * np.clip(raw, 0, 1), atol=0.51)


def test_large_images_are_made_smaller():
    pixels = np.zeros((1, 2, 224, 224, 3), np.uint8)
    pixels[0, 1] = 90
    grid = image_grid(pixels)
    assert grid.shape == (74, 149, 3)
    assert (grid[:, 75:] == 90).all()


def test_full_precision_has_a_row_too(made):
    run = made[0]
    first = run.inspection.observations[0]
    site = Site(first.site.path, "weight", first.site.shape, None, None, 32.0)
    changed = (first.replace(site=site, code_counts=None), *run.inspection.observations[1:])
    page = Page(run_page(run._replace(inspection=run.inspection._replace(observations=changed))))
    row = page.tables["Weights"][1]
    assert row[2:4] == ["not quantized", "32.00"]


def test_losses_that_were_not_finite_leave_a_gap(made):
    run = made[0]
    lines = [{**line, "hinge": None} if line["step"] == 6 else line for line in run.metrics]
    (hinge,) = (chart for chart in loss_charts([("", run._replace(metrics=lines))]) if "hinge" in chart.title)
    assert hinge.curves[0].path.count("M") == 2
    check_self_contained(run_page(run._replace(metrics=lines)))


@pytest.mark.slow
def test_runs_side_by_side(made, tmp_path):
    write_run(tmp_path / "other", **{"quant.act_granularity": "tensor", "seed": 5})
    runs = [made[0], read_run(tmp_path / "other")]
    html = comparison_page(runs)
    page = check_self_contained(html)
    names = ["a<b>'c", "other"]
    differing = {row[0]: row[1:] for row in page.tables["Settings that differ"]}
    assert differing["Setting"] == names
    assert differing["seed"] == ["0", "5"]
    assert differing["quant.act_granularity"] == ["sample_channel", "tensor"]
    assert "batch_size" not in differing
    results = {row[0]: row[1:] for row in page.tables["Results"]}
    assert results["Teacher, full precision"] == ["95.00", "95.00"]
    for kind in ("weight", "activation"):
        _, *rows = page.tables[f"Quantization errors of {kind}s"]
        for i, run in enumerate(runs):
            sites = [o for o in run.inspection.observations if o.site.kind == kind]
            assert [row[1 + i] for row in rows] == [f"{100 * o.quantization_error:.2f}" for o in sites]
    curves = [a for tag, a in page.elements if tag == "path" and a["class"] == "curve s1"]
    assert len(curves) == 1 + 6  # the legend, and each chart
    assert "a call of train_and_evaluate from a program" in " ".join(page.text.split())

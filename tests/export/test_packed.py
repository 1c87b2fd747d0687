"""Packed files: what comes back is what the fake quantizer computes, and nothing else is taken."""

import json

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from granq_jax import QuantSpec, create_model, quantize
from granq_jax.export import load_packed, save_packed
from granq_jax.export import packed as packed_module
from granq_jax.quant import RANGES, quantize_params, storage_bytes
from granq_jax.quant.spec import WEIGHT_GRANULARITIES
from tests.conftest import one_line_error

IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def digits():
    model = create_model("resnet8_digits")
    return model, jax.device_get(jax.jit(model.init)(jax.random.key(0), IMAGES))


def assert_same(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, jax.device_get(theirs))


@pytest.mark.parametrize(
    ("granularity", "bits", "ranges"),
    [*((granularity, bits, "minmax") for granularity in WEIGHT_GRANULARITIES for bits in (3, 8)), ("kernel", 3, "mse")],
)
def test_weights_come_back_bit_for_bit(digits, tmp_path, bits, granularity, ranges):
    _, variables = digits
    spec = QuantSpec(
        weight_bits=bits,
        weight_granularity=granularity,
        weight_ranges=ranges,
        overrides=((r"^stem", {"weight_bits": 8}),),
    )
    save_packed(tmp_path / "a.safetensors", variables, spec, "resnet8_digits")
    packed = load_packed(tmp_path / "a.safetensors")
    assert packed.network == "resnet8_digits"
    assert_same(packed.variables["params"], quantize_params(variables["params"], spec, "xla"))
    assert_same(packed.variables["batch_stats"], variables["batch_stats"])


def test_the_spec_that_comes_back_quantizes_activations_alone(digits, tmp_path):
    model, variables = digits
    spec = QuantSpec(overrides=((r"^stem", {"weight_bits": 8, "act_bits": 4}),))
    save_packed(tmp_path / "a.safetensors", variables, spec)
    packed = load_packed(tmp_path / "a.safetensors")
    ours = quantize(model, packed.spec, impl="xla").apply(packed.variables, IMAGES)
    np.testing.assert_allclose(ours, quantize(model, spec, impl="xla").apply(variables, IMAGES), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_other_dtypes(digits, tmp_path, x64, dtype):
    _, variables = digits
    variables = jax.device_get(jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables))
    save_packed(tmp_path / "a.safetensors", variables, QuantSpec())
    packed = load_packed(tmp_path / "a.safetensors")
    assert_same(packed.variables["params"], quantize_params(variables["params"], QuantSpec(), "xla"))


def test_resnet20_takes_little_more_than_its_codes(tmp_path):
    variables = jax.jit(create_model("resnet20_cifar10").init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    spec = QuantSpec(weight_bits=3)
    size = save_packed(tmp_path / "a.safetensors", variables, spec, "resnet20_cifar10")
    assert size == (tmp_path / "a.safetensors").stat().st_size
    needed = sum(bytes_ for what, bytes_ in storage_bytes(variables, spec).items() if what != "teacher")
    assert needed < size <= 1.15 * needed
    with safetensors.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        header = json.loads(file.metadata()["granq_jax"])
        assert (header["network"], header["spec"]["weight_bits"]) == ("resnet20_cifar10", 3)
        for name in file.keys():  # noqa: SIM118 (it is not iterable)
            described = file.get_slice(name)
            assert described.get_dtype() == ("U8" if name.endswith("kernel") else "F32")


def test_what_is_not_quantized_is_kept_as_it_is(tmp_path):
    model, x = nn.Sequential([nn.Dense(5), nn.Dense(3)]), np.ones((1, 4), np.float32)
    variables = jax.device_get(model.init(jax.random.key(0), x))
    spec = QuantSpec(placement="operand", overrides=(("layers_1", {"weight_bits": None, "act_bits": None}),))
    save_packed(tmp_path / "a.safetensors", variables, spec)
    packed = load_packed(tmp_path / "a.safetensors")
    assert_same(packed.variables["params"]["layers_1"], variables["params"]["layers_1"])
    assert packed.spec == QuantSpec(
        weight_bits=None, placement="operand", overrides=(("layers_1", {"act_bits": None}),)
    )


class Normalised(nn.Module):
    """A layer whose wrapper names its variables by paths: keys with slashes."""

    wrapper: type
    options: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x)).mean((1, 2))
        return self.wrapper(nn.Dense(10))(x, **dict(self.options))


@pytest.mark.parametrize(
    "model",
    [Normalised(nn.WeightNorm), Normalised(nn.SpectralNorm, (("update_stats", False),))],
    ids=["WeightNorm", "SpectralNorm"],
)
def test_keys_with_slashes_come_back(tmp_path, model):
    images = np.asarray(jax.random.normal(jax.random.key(0), (2, 8, 8, 1)))
    variables = jax.device_get(model.init(jax.random.key(1), images))
    assert any("/" in key for keys in flax.traverse_util.flatten_dict(variables) for key in keys)
    spec = QuantSpec(weight_bits=4, act_bits=4, placement="operand")
    save_packed(tmp_path / "a.safetensors", variables, spec)
    packed = load_packed(tmp_path / "a.safetensors")
    assert jax.tree.structure(packed.variables) == jax.tree.structure(variables)
    assert_same(packed.variables["params"], quantize_params(variables["params"], spec, "xla"))
    quantize(model, packed.spec).apply(packed.variables, images)


def test_any_tree_of_dictionaries_comes_back(tmp_path):
    kernel = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    variables = {
        "params": {"a": {"b/kernel": kernel, "%2F": {"kernel": kernel}}, "a/b": {"kernel": kernel[:2]}, "c": {}},
        "batch_stats": {},
        "100%": {"count": np.int32(3)},
    }
    save_packed(tmp_path / "a.safetensors", variables, QuantSpec(weight_bits=None))
    assert_same(load_packed(tmp_path / "a.safetensors").variables, variables)


@pytest.mark.parametrize("leaf", [(np.ones(2), np.ones(2)), [1.0], "text", None], ids=lambda leaf: type(leaf).__name__)
def test_what_is_no_array_is_refused(tmp_path, leaf):
    with one_line_error(ValueError, "variables", "'cache/carry'", type(leaf).__name__, "arrays"):
        save_packed(tmp_path / "a.safetensors", {"params": {}, "cache": {"carry": leaf}}, QuantSpec())
    assert not list(tmp_path.iterdir())


def test_what_is_written_can_be_read(tmp_path, monkeypatch):
    block = {"conv": {"kernel": np.ones((1, 1), np.float32)}, "norm": dict.fromkeys(("scale", "bias"), np.ones(1))}
    params = {f"stage{number}_{'x' * 2000}": block for number in range(40)}
    save_packed(tmp_path / "a.safetensors", {"params": params}, QuantSpec())
    with (tmp_path / "a.safetensors").open("rb") as file:
        assert int.from_bytes(file.read(8), "little") > 1 << 18
    assert load_packed(tmp_path / "a.safetensors").variables["params"].keys() == params.keys()
    monkeypatch.setattr(packed_module, "MAX_HEADER_BYTES", 1 << 18)
    with one_line_error(ValueError, "variables", "160 arrays", str(1 << 18)):
        save_packed(tmp_path / "b.safetensors", {"params": params}, QuantSpec())
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("shapes", [((4_000_000, 1), (1, 400_000)), ((4_000_000,), (400_000, 1)), ((4, 6), (4, 6, 2))])
def test_a_small_file_cannot_ask_for_much_memory(tmp_path, shapes):
    of_codes, of_ranges = shapes
    header = json.dumps(
        {
            "format": 1,
            "network": "",
            "spec": {},
            "codes": {"head": [2, of_codes, "float32"]},
        }
    )
    packed = np.zeros(-(-int(np.prod(of_codes)) // 4), np.uint8)
    tensors = {"params/head/kernel": packed, "params/head/kernel.ranges": np.ones((2, *of_ranges), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "a.safetensors", {"granq_jax": header})
    with one_line_error(ValueError, "a.safetensors", "ranges", "head"):
        load_packed(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    kernel = np.ones((3, 2), np.float32)
    kernel[1, 1] = value
    with pytest.raises(ValueError, match="'head' holds NaN or infinity"):
        save_packed(tmp_path / "a.safetensors", {"params": {"head": {"kernel": kernel}}}, QuantSpec())
    assert not list(tmp_path.iterdir())


def header_with(**changes):
    def damage(tensors, header):
        header.update(changes)

    return damage


def codes_cut(tensors, header):
    tensors["params/head/kernel"] = tensors["params/head/kernel"][:-1]


def ranges_of_another(tensors, header):
    tensors["params/head/kernel.ranges"] = tensors["params/head/kernel.ranges"][..., :1].repeat(7, -1)


def codes_gone(tensors, header):
    del tensors["params/head/kernel"]


@pytest.mark.parametrize(
    "damage",
    [
        header_with(format=2),
        header_with(codes={"head": [3, [10**9, 10**9], "float32"]}),
        header_with(codes={"head": [3, [-4, -6], "float32"]}),
        header_with(codes={"head": [9, [4, 6], "float32"]}),
        header_with(codes={"head": [3, [4, 6], "object"]}),
        header_with(codes={"elsewhere": [3, [4, 6], "float32"]}),
        header_with(spec={"weight_bits": 77}),
        header_with(spec={"no_such_field": 1}),
        codes_cut,
        codes_gone,
        ranges_of_another,
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    kernel = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    save_packed(path, {"params": {"head": {"kernel": kernel}}}, QuantSpec())
    with safetensors.safe_open(path, "numpy") as file:
        header = json.loads(file.metadata()["granq_jax"])
    tensors = safetensors.numpy.load_file(path)
    damage(tensors, header)
    safetensors.numpy.save_file(tensors, path, {"granq_jax": json.dumps(header)})
    with pytest.raises(ValueError, match=r"a.safetensors' is not a packed model, or damaged: "):
        load_packed(path)


def test_files_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for content in (b"", b"no such file", (2**40).to_bytes(8, "little")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a packed model"):
            load_packed(path)
    safetensors.numpy.save_file({"a": np.ones(2)}, path)
    with pytest.raises(ValueError, match="is not a packed model"):
        load_packed(path)
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "none.safetensors")


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.DenseGeneral(5, axis=(-2, -1), name="out")(nn.DenseGeneral((3, 4), name="heads")(x))


def test_layers_of_other_forms_are_packed_as_their_model_has_them(tmp_path):
    model, x = Heads(), np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    variables = jax.device_get(model.init(jax.random.key(0), x))
    spec = QuantSpec(weight_bits=3, act_bits=None, placement="operand")
    with pytest.raises(ValueError, match=r"'heads' has 3 dimensions.*layouts"):
        save_packed(tmp_path / "a.safetensors", variables, spec)
    student = quantize(model, spec)
    save_packed(tmp_path / "a.safetensors", variables, spec, layouts=student.layouts(variables, x))
    packed = load_packed(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(
        quantize(model, packed.spec).apply(packed.variables, x), quantize(model, spec, impl="xla").apply(variables, x)
    )


def test_ranges_under_their_former_name_are_found(tmp_path):
    model, x = nn.Dense(3), np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    spec = QuantSpec(placement="operand", act_granularity="tensor", act_ranges="moving_average")
    variables = model.init(jax.random.key(0), x)
    student = quantize(model, spec)
    _, ranges = student.apply(variables, x, mutable=[RANGES])
    save_packed(tmp_path / "a.safetensors", {**variables, "ranges": ranges[RANGES]}, spec)
    packed = load_packed(tmp_path / "a.safetensors")
    expected = student.apply({**variables, **ranges}, 0.1 * x)
    np.testing.assert_array_equal(quantize(model, packed.spec).apply(packed.variables, 0.1 * x), expected)

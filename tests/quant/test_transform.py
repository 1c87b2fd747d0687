import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from granq_jax import Activation, QuantSpec, create_model, fake_quant, load_torch, quantize
from granq_jax.quant import effective_weight_bits, quantize_params
from tests.conftest import one_line_error
from tests.golden_figures import CIFAR, IMAGENET, network_images, state_dict
from tests.quant import reference

PARAMETERS = {  # as published for the public checkpoints
    "resnet20_cifar10": 272_474,
    "resnet20_cifar100": 278_324,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenetv2_w1": 3_504_960,
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n == "resnet20_cifar10" else [pytest.mark.slow]) for n in PARAMETERS],
)
def test_golden_logits(x64, name):
    golden = CIFAR if "cifar" in name else IMAGENET
    model = create_model(name)
    variables = load_torch(name, state_dict(golden[f"net/{name}/keys"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == PARAMETERS[name]
    images = network_images(name)

    def check(apply, key):
        expected = golden[f"net/{name}/{key}"]
        # A logit near zero is a difference of large numbers: the floor is set by the largest one.
        np.testing.assert_allclose(
            jax.jit(apply)(variables, images), expected, rtol=1e-8, atol=1e-9 * np.abs(expected).max()
        )

    check(model.apply, "fp")
    for bits in (3, 4, 5):
        student = quantize(model, QuantSpec(weight_bits=bits, act_bits=bits, weight_granularity="kernel"))
        check(student.apply, f"w{bits}a{bits}")


def test_resnet20_sites():
    model = create_model("resnet20_cifar10")
    images = jnp.ones((2, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    sites = quantize(model, QuantSpec(weight_bits=4, act_bits=3)).sites(variables, images)
    weights = [site for site in sites if site.kind == "weight"]
    activations = [site for site in sites if site.kind == "activation"]
    assert len(weights) == 22  # stem, 18 in units, 2 shortcuts, head
    assert len(activations) == 19
    assert {site.bits for site in weights} == {4}
    assert activations[0].shape == (2, 32, 32, 16)
    assert activations[0].effective_bits == pytest.approx(3 + 64 / 32**2)


def test_weights_are_a_pure_function_of_the_parameters():
    model = create_model("resnet8_digits")
    params = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 1)))["params"]
    flat = flatten_dict(params)
    quantized = flatten_dict(quantize_params(params, QuantSpec(weight_bits=3)))
    assert flat.keys() == quantized.keys()
    for path, value in flat.items():
        if path[-1] == "kernel":
            np.testing.assert_array_equal(quantized[path], fake_quant(value, bits=3, granularity="out_channel"))
        else:
            assert quantized[path] is value


def test_effective_bits_of_resnet20():
    model = create_model("resnet20_cifar10")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
    weights = [leaf for path, leaf in flatten_dict(params).items() if path[-1] == "kernel"]
    elements = sum(leaf.size for leaf in weights)
    outputs = sum(leaf.shape[-1] for leaf in weights)
    assert effective_weight_bits(params, QuantSpec(weight_bits=3)) == pytest.approx(3 + 64 * outputs / elements)
    assert effective_weight_bits(params, QuantSpec(weight_bits=None)) is None


class Functional(nn.Module):
    """Calls ``nn.relu`` as a function, so that no activation module can be met."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(inputs=jnp.mean(x, (1, 2)))


class Swish(nn.Module):
    def __call__(self, x):
        return nn.swish(x)


class Modular(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Swish(name="swish")(nn.Conv(4, (3, 3), name="conv")(x))
        return Activation("relu6", name="relu")(nn.Conv(3, (1, 1), name="head")(x))


@pytest.fixture
def images():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 6, 3)), jnp.float32)


def test_operand_placement_quantizes_the_inputs_of_layers(images):
    model = Functional()
    variables = model.init(jax.random.key(0), images)
    spec = QuantSpec(weight_bits=3, act_bits=4, placement="operand")
    weights = quantize_params(variables["params"], spec)
    x = nn.relu(nn.Conv(4, (3, 3)).apply({"params": weights["conv"]}, fake_quant(images, bits=4)))
    pooled = fake_quant(jnp.mean(x, (1, 2)), bits=4)
    expected = nn.Dense(3).apply({"params": weights["head"]}, pooled)
    np.testing.assert_array_equal(quantize(model, spec).apply(variables, images), expected)


def test_activation_placement_finds_named_modules(images):
    model = Modular()
    variables = model.init(jax.random.key(0), images)
    for wanted in ("Swish", Swish):
        spec = QuantSpec(weight_bits=None, act_bits=3, activation_modules=(wanted,))
        x = fake_quant(nn.swish(nn.Conv(4, (3, 3)).apply({"params": variables["params"]["conv"]}, images)), bits=3)
        x = nn.Conv(3, (1, 1)).apply({"params": variables["params"]["head"]}, x)
        expected = fake_quant(nn.relu6(x), bits=3)
        np.testing.assert_array_equal(quantize(model, spec).apply(variables, images), expected)


def test_full_precision_is_the_model_itself(images):
    model = Modular()
    variables = model.init(jax.random.key(0), images)
    spec = QuantSpec(weight_bits=None, act_bits=None)
    np.testing.assert_array_equal(quantize(model, spec).apply(variables, images), model.apply(variables, images))


def test_overrides_reach_weights_and_activations(images):
    model = Modular()
    variables = model.init(jax.random.key(0), images)
    spec = QuantSpec(overrides=(("^conv$", {"weight_bits": 8}), ("^relu$", {"act_bits": None})))
    sites = {(site.path, site.kind): site.bits for site in quantize(model, spec).sites(variables, images)}
    assert sites == {
        ("conv", "weight"): 8,
        ("head", "weight"): 3,
        ("relu", "activation"): None,
        ("conv", "input"): None,
        ("head", "input"): None,
    }


def test_gradients_reach_weights_and_images(images):
    model = create_model("resnet8_digits")
    x = images[..., :1]
    variables = jax.jit(model.init)(jax.random.key(0), x)
    student = quantize(model, QuantSpec())
    gradients = jax.jit(jax.grad(lambda p, x: jnp.sum(student.apply({**variables, "params": p}, x)), argnums=(0, 1)))(
        variables["params"], x
    )
    for leaf in jax.tree.leaves(gradients):
        assert bool(jnp.any(leaf != 0))


@pytest.mark.parametrize(
    ("words", "model", "kwargs"),
    [
        (("placement", "'activation'", "Functional", "conv", "head"), Functional(), {}),
        (("activation_modules", "'Gelu'", "relu"), Modular(), {"activation_modules": ("Gelu",)}),
        (("overrides", "'^stem/'", "relu"), Modular(), {"overrides": (("^stem/", {"act_bits": 8}),)}),
        (("'^conv$' with act_bits", "relu"), Modular(), {"overrides": (("^conv$", {"act_bits": 8}),)}),
        (("placement", "'operand'", "Swish"), Swish(), {"placement": "operand", "weight_bits": None}),
        (("weight_bits", "Swish"), Swish(), {"placement": "operand"}),
    ],
)
def test_what_matches_nothing_is_refused(images, words, model, kwargs):
    variables = {"params": {}, **model.init(jax.random.key(0), images)}
    student = quantize(model, QuantSpec(**kwargs))
    with one_line_error(ValueError, *words):
        student.apply(variables, images)


def test_wrong_types_are_refused():
    with one_line_error(TypeError, "model", "str"):
        quantize("resnet", QuantSpec())
    with one_line_error(TypeError, "spec", "dict"):
        quantize(Modular(), {"act_bits": 3})
    with one_line_error(ValueError, "impl", "'triton'"):
        quantize(Modular(), QuantSpec(), impl="triton")


def test_observations_equal_a_computation_in_numpy(x64):
    """A dense layer, an activation, a dense layer: simple enough to be written down again."""
    model = nn.Sequential([nn.Dense(6), Activation("relu"), nn.Dense(3)])
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 4))
    teacher = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), model.init(jax.random.key(0), jnp.asarray(x)))
    student = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape), teacher)
    spec = QuantSpec(weight_bits=3, act_bits=4, overrides=(("layers_2", {"weight_bits": None}),))
    first, last, activation = jax.jit(quantize(model, spec).observe)(teacher, student, x)

    def norm_ratio(a, b):
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    kernel, bias = (student["params"]["layers_0"][name] for name in ("kernel", "bias"))
    codes, values = reference.fake_quant(kernel, 3, "out_channel")
    hidden = np.maximum(x @ values + bias, 0)
    of_teacher = np.maximum(x @ teacher["params"]["layers_0"]["kernel"] + teacher["params"]["layers_0"]["bias"], 0)
    hidden_codes, hidden_values = reference.fake_quant(hidden, 4, "sample_channel")

    assert first.quantization_error == pytest.approx(norm_ratio(values, kernel), rel=1e-12)
    assert first.teacher_error == pytest.approx(norm_ratio(values, teacher["params"]["layers_0"]["kernel"]), rel=1e-12)
    assert first.code_counts.tolist() == np.bincount((codes + 4).astype(int).ravel(), minlength=8).tolist()
    assert activation.site.path == "layers_1"
    assert activation.quantization_error == pytest.approx(norm_ratio(hidden_values, hidden), rel=1e-12)
    assert activation.teacher_error == pytest.approx(norm_ratio(hidden_values, of_teacher), rel=1e-12)
    expected = np.bincount((hidden_codes + 8).astype(int).ravel(), minlength=16)
    assert activation.code_counts.tolist() == expected.tolist()
    assert (last.site.bits, last.quantization_error, last.code_counts) == (None, 0, None)
    assert last.teacher_error > 0


def test_an_array_of_zeros_has_no_error():
    model = nn.Dense(2)
    zeros = {"params": {"kernel": jnp.zeros((3, 2)), "bias": jnp.zeros(2)}}
    spec = QuantSpec(weight_bits=2, act_bits=None, placement="operand")
    weight, _ = quantize(model, spec).observe(zeros, zeros, jnp.ones((1, 3)))
    assert (weight.quantization_error, weight.teacher_error) == (0, 0)

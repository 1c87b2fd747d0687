"""The joint step against the golden trajectory, and its properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from granq_jax import OptimizerSettings, Trainer
from granq_jax.distill import joint_step as joint
from granq_jax.models import Generator, create_model
from granq_jax.quant import QuantSpec
from granq_jax.teachers.torch_import import load_torch, torch_name
from tests.golden_figures import CIFAR, GENERATOR_NAMES, generator_variables, state_dict

NAME = "resnet20_cifar10"


def golden_trainer():
    return Trainer(
        model=create_model(NAME),
        generator=Generator(classes=10),
        spec=QuantSpec(weight_bits=3, act_bits=3, weight_granularity="kernel"),
        optimizers=OptimizerSettings(warmup_epochs=1, steps_per_epoch=2),
        batch_size=16,
        dtype=jnp.float64,
    )


@pytest.mark.slow
def test_six_steps_follow_the_golden_trajectory(x64):
    trainer = golden_trainer()
    teacher = load_torch(NAME, state_dict(CIFAR[f"net/{NAME}/keys"]))
    state = trainer.init(teacher).replace(generator=generator_variables(state_dict(CIFAR["gen/keys"])))
    steps = {warmup: jax.jit(joint.update, static_argnums=(0, 1)) for warmup in (True, False)}
    for i in range(6):
        z, labels = jnp.asarray(CIFAR["gen/z"][i]), jnp.asarray(CIFAR["gen/labels"][i])
        state, metrics = steps[i < 2](trainer, i < 2, state, teacher, z, labels)
        np.testing.assert_allclose(metrics["loss_g"], CIFAR["traj/loss_G"][i], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss_s"], CIFAR["traj/loss_S"][i], rtol=1e-6)
    generator = flatten_dict(state.generator)
    assert set(generator) == set(GENERATOR_NAMES)
    for path, value in generator.items():
        if path[0] == "batch_stats":  # stored under "after1", but as they are after all six steps
            expected = CIFAR[f"gen/after1/{GENERATOR_NAMES[path]}"]
            np.testing.assert_allclose(value, expected, rtol=1e-8, atol=1e-10, err_msg=str(path))
        np.testing.assert_allclose(
            jnp.linalg.norm(value), CIFAR[f"traj/gen_norm/{GENERATOR_NAMES[path]}"], rtol=1e-6, err_msg=str(path)
        )
    before, after = flatten_dict(teacher), flatten_dict(state.student)
    for path in before:
        np.testing.assert_allclose(
            jnp.linalg.norm((after[path] - before[path]).ravel()),
            CIFAR[f"traj/student_delta_norm/{torch_name(NAME, path)}"],
            rtol=1e-6,
            atol=1e-15,
            err_msg=str(path),
        )

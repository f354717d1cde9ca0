"""Other packages' losses, for the tables of compiled programs."""

import sys

import jax
import numpy as np
import pytest

from benchmarks import external
from benchmarks.external import Baseline

# What tokamax's chunked loss need not pad.
VOCAB = 2048
BATCH, LENGTH, WIDTH = 2, 8, 16
MODULES = {"tokamax": "tokamax", "marin-levanter": external.LEVANTER_MODULE}


def arrays(dtype: str = "float32") -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    return (
        jax.random.normal(keys[0], (BATCH, LENGTH, WIDTH), dtype),
        jax.random.normal(keys[1], (WIDTH, VOCAB), dtype),
        jax.random.randint(keys[2], (BATCH, LENGTH), 0, VOCAB),
    )


def value_and_gradients(baseline: Baseline, dtype: str = "float32") -> list[np.ndarray]:
    step = jax.jit(jax.value_and_grad(baseline, argnums=(0, 1)))
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(step(*arrays(dtype)))]


def test_naive_baselines_agree():
    plain, exact = map(value_and_gradients, external.naive_baselines().values())
    for one, other in zip(plain, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_naive_baselines_are_of_float32_and_differ_in_the_logits_alone():
    rounded, exact = external.naive_baselines().values()
    hidden, lm_head, targets = arrays("bfloat16")
    truth = exact(hidden.astype("float32"), lm_head.astype("float32"), targets)
    losses = [loss(hidden, lm_head, targets) for loss in (rounded, exact)]
    assert {loss.dtype.name for loss in losses} == {"float32"}
    errors = [abs(float(loss - truth)) for loss in losses]
    assert errors[1] < 1e-5 < errors[0] < 0.1


def test_missing_packages_are_skipped_with_the_reason(monkeypatch):
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    found = external.find()
    assert found.baselines == {} == external.external_baselines()
    assert found.skipped.keys() == MODULES.keys()
    for package, module in MODULES.items():
        assert module in found.skipped[package]


@pytest.mark.filterwarnings("ignore")
def test_installed_packages_have_the_naive_loss_and_gradients():
    baselines, skipped = external.find()
    if not baselines:
        pytest.skip("; ".join(skipped.values()))
    naive = value_and_gradients(external.naive_baselines()["naive"])
    for name, baseline in baselines.items():
        with jax.numpy_dtype_promotion("standard"):
            given = value_and_gradients(baseline)
        for one, other in zip(given, naive, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=name)

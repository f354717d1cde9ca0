"""Terms whose logits have a temperature of their own, and what is measured beside."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_batches import compile_for, normal
from support.programs import dot_flops
from support.trees import assert_trees_close

import ava_jax
from ava_jax import terms
from ava_jax.kernel.platforms import Implementation

B, S, D, V = 2, 18, 8, 300
POLICY = terms.PolicyTerm("grpo", logits_temperature=0.7)
TERMS: dict[str, tuple[Any, ...]] = {
    "one": (POLICY,),
    "low": (terms.PolicyTerm("grpo", logits_temperature=0.2),),
    "coldest": (terms.PolicyTerm("grpo", logits_temperature=0.05),),
    "beside 1": (terms.CrossEntropy(), terms.ZLoss(1e-2), POLICY),
}


def batch() -> dict[str, Any]:
    """Returns a call's arguments; hidden states are NaN where the mask is 0."""
    keys = jax.random.split(jax.random.key(0), 6)
    mask = jax.random.uniform(keys[0], (B, S)) < 0.8
    hidden = jnp.where(mask[..., None], normal(keys[1], B, S, D), jnp.nan)
    return {
        "hidden_states": hidden,
        "lm_head": normal(keys[2], D, V + 4),
        "lm_head_bias": normal(keys[3], V + 4).at[9].set(-jnp.inf),
        "targets": jax.random.randint(keys[4], (B, S), 0, 9),
        "attention_mask": mask,
        "extra_inputs": {"advantages": normal(keys[5], B, S)},
    }


FLOATS = ("hidden_states", "lm_head", "lm_head_bias")


def run(
    name: str, implementation: Implementation | None, entry: str = "", **options: Any
):
    """Returns the loss, aux, and the gradients of the loss or of an entry of aux."""
    loss_fn = ava_jax.compose(
        TERMS[name], vocab_size=V, implementation=implementation, **options
    )
    x = batch()

    def loss(floats: dict[str, Any]):
        value, aux, _ = loss_fn(loss_fn.init(), **{**x, **floats})
        return aux[entry] if entry else value, (value, aux)

    floats = {k: x[k] for k in FLOATS}
    grads, values = jax.jit(jax.grad(loss, has_aux=True))(floats)
    return values, grads


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("name", TERMS)
def test_all_implementations_agree(monkeypatch, name, cap):
    options = {"logit_soft_cap": cap}
    want = run(name, "reference", **options)
    assert_trees_close(run(name, "cpu", **options), want, 2e-5)
    sizes = {"chunk_size": 6, "block_size": 3}
    for platform in ("gpu", "tpu"):
        compile_for(monkeypatch, platform)
        assert_trees_close(run(name, "xla", **sizes, **options), want, 2e-5)
    compile_for(monkeypatch, "tpu", rounds=True)
    values, grads = run(name, "xla", **sizes, **options)
    assert_trees_close(values, want[0], 2e-5)
    assert_trees_close(grads, want[1], 2**-8)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize("name", TERMS)
def test_what_is_measured_is_at_temperature_one(name, implementation):
    """And the entropy that the policy reports is at its own."""
    (_, aux), _ = run(name, implementation)
    x = batch()
    mask = np.asarray(x["attention_mask"])
    z = np.asarray(x["hidden_states"], np.float64)[mask] @ np.asarray(x["lm_head"])
    z = (z + np.asarray(x["lm_head_bias"]))[:, :V]

    def log_p(temperature: float) -> Any:
        scaled = z / temperature
        top = scaled.max(-1, keepdims=True)
        return scaled - top - np.log(np.exp(scaled - top).sum(-1, keepdims=True))

    def entropy(temperature: float) -> float:
        logs = log_p(temperature)
        return -(np.exp(logs) * np.where(np.isinf(logs), 0, logs)).sum(-1).mean()

    targets = np.asarray(x["targets"])[mask]
    nll = -np.take_along_axis(log_p(1.0), targets[:, None], -1).mean()
    accuracy = (z.argmax(-1) == targets).mean()
    own = TERMS[name][-1].logits_temperature
    got = [aux[k] for k in ("nll", "accuracy", "entropy", "policy_entropy")]
    wanted = [nll, accuracy, entropy(1.0), entropy(own)]
    np.testing.assert_allclose(got, wanted, rtol=2e-5)


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("entry", ["nll", "entropy"])
@pytest.mark.parametrize("name", ["one", "low", "coldest"])
def test_what_is_measured_has_its_gradient(monkeypatch, name, entry, rounds):
    _, want = run(name, "reference", entry)
    assert all(np.abs(g).max() > 1e-3 for g in want.values())
    compile_for(monkeypatch, "tpu", rounds=rounds)
    _, grads = run(name, "xla", entry, chunk_size=6)
    is_rounded = rounds and name != "coldest"
    assert_trees_close(grads, want, 2**-8 if is_rounded else 2e-5)


@dataclasses.dataclass(frozen=True)
class Normalizer(ava_jax.TokenTerm):
    """The log-normaliser, from the numbers at one temperature or the other."""

    is_tempered: bool = False
    name: str = "normalizer"
    logits_temperature: float = 0.7

    def __call__(self, stats, inputs):
        if self.is_tempered:
            return stats.log_sum_tempered + stats.temperature
        return stats.log_sum + 1.0


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_a_term_sees_one_temperature(implementation):
    """Not the one at which what is measured is computed beside it."""
    x = batch()
    del x["extra_inputs"]

    def results(is_tempered: bool):
        term = Normalizer(is_tempered=is_tempered)
        loss_fn = ava_jax.compose((term,), vocab_size=V, implementation=implementation)
        return jax.jit(lambda **x: loss_fn(loss_fn.init(), **x))(**x)

    assert_trees_close(results(True), results(False), 1e-6)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_one_temperature_takes_one_product(monkeypatch, platform):
    compile_for(monkeypatch, platform)
    loss_fn = ava_jax.compose((POLICY,), vocab_size=V)
    x = batch()

    def loss(hidden, lm_head):
        given = {**x, "hidden_states": hidden, "lm_head": lm_head}
        return loss_fn(loss_fn.init(), **given)[0]

    units = {}
    for name, f in (("value", loss), ("gradient", jax.grad(loss, argnums=(0, 1)))):
        jaxpr = jax.make_jaxpr(f)(x["hidden_states"], x["lm_head"]).jaxpr
        units[name] = dot_flops(jaxpr) / (B * S * D * (V + 4))
    # Two of the columns are computed again, to estimate the row max.
    assert 2 <= units["value"] < 2.1
    assert 6 <= units["gradient"] < 6.1

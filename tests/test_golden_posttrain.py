"""The losses of log-probabilities reproduce the reference numbers and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.post_training_cases import (
    FLOAT32,
    FLOAT64,
    Arrays,
    LossOfLogProbs,
    PostTrainingCase,
    check,
    compare,
    compare_both,
    log_probs_case,
    post_training_cases_of,
    run_of_log_probs,
)

from ava_jax import losses


def policy(log_probs: jax.Array, inputs: Arrays, config: dict[str, Any]) -> jax.Array:
    names = ("old_log_probs", "ref_log_probs", "sampler_weights")
    arrays = {name: inputs[name] for name in names if name in inputs}
    mask = inputs["attention_mask"]
    loss, _ = losses.policy_loss(
        log_probs, inputs["advantages"], mask, **arrays, **config
    )
    return loss


def dpo(log_probs: jax.Array, inputs: Arrays, config: dict[str, Any]) -> jax.Array:
    chosen, rejected = pairs_of(log_probs, inputs, config.pop("average"))
    ref_chosen, ref_rejected = jnp.split(inputs["ref"], 2)
    pairs, _ = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **config)
    return pairs.mean()


def pairs_of(log_probs: jax.Array, inputs: Arrays, average: bool) -> list[jax.Array]:
    mask = inputs["attention_mask"]
    rows = losses.sequence_log_probs(log_probs, mask, average=average)
    return jnp.split(rows, 2)


def without_reference(loss: Any) -> LossOfLogProbs:
    def call(log_probs: jax.Array, inputs: Arrays, config: dict[str, Any]) -> jax.Array:
        chosen, rejected = pairs_of(log_probs, inputs, config.pop("average"))
        return loss(chosen, rejected, **config)[0].mean()

    return call


def kto(log_probs: jax.Array, inputs: Arrays, config: dict[str, Any]) -> jax.Array:
    rows, _ = losses.kto_loss(
        losses.sequence_log_probs(log_probs, inputs["attention_mask"], average=False),
        inputs["ref"],
        inputs["desirable"],
        inputs.get("kl"),
        **config,
    )
    return rows.mean()


LOSSES: dict[str, LossOfLogProbs] = {
    "policy": policy,
    "dpo": dpo,
    "orpo": without_reference(losses.orpo_loss),
    "cpo": without_reference(losses.cpo_loss),
    "simpo": without_reference(losses.simpo_loss),
    "kto": kto,
}
KINDS = ("log_probs", *LOSSES)
CASES = post_training_cases_of(*KINDS)


def check_any(case: PostTrainingCase, tolerance: float) -> None:
    if case.kind == "log_probs":
        check(case, log_probs_case(), tolerance)
    else:
        compare_both(case, run_of_log_probs(case, LOSSES[case.kind]), tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: PostTrainingCase) -> None:
    check_any(case, FLOAT32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64(case: PostTrainingCase) -> None:
    with jax.enable_x64(True):
        check_any(case, FLOAT64)


@pytest.mark.parametrize("implementation", [None, "xla", "reference", "cpu"])
@pytest.mark.parametrize(
    "case",
    [
        # A bias and a temperature; a soft-cap and a temperature.
        pytest.param(case, marks=[] if case.name[-1] in "24" else [pytest.mark.slow])
        for case in post_training_cases_of("log_probs")
    ],
    ids=lambda case: case.name,
)
def test_log_probs_in_chunks(case: PostTrainingCase, implementation: Any) -> None:
    options = {"chunk_size": 4, "block_size": 2, "implementation": implementation}
    with jax.enable_x64(True):
        check(case, log_probs_case(**options), FLOAT64)


def test_every_case_is_compared() -> None:
    counts = {kind: len(post_training_cases_of(kind)) for kind in KINDS}
    assert counts == {
        "log_probs": 5,
        "policy": 63,
        "dpo": 20,
        "orpo": 2,
        "cpo": 4,
        "simpo": 4,
        "kto": 2,
    }
    assert len(CASES) == sum(counts.values())


def test_a_wrong_number_is_noticed() -> None:
    case = post_training_cases_of("policy")[0]
    for group, key in (("out", "loss"), ("grad", "lm_head")):
        right = case.arrays[group]
        compare(case, group, right, FLOAT64)
        for wrong in (right[key] * (1 + 1e-7), right[key] * float("nan")):
            with pytest.raises(AssertionError, match=key):
                compare(case, group, {**right, key: wrong}, FLOAT64)

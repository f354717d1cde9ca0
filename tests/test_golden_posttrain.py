"""The losses of log-probabilities reproduce the reference numbers and gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.post_training_cases import (
    FLOAT32,
    FLOAT64,
    Arrays,
    Call,
    PostTrainingCase,
    check,
    compare,
    log_probs_case,
    plain_log_probs,
    post_training_cases_of,
)

from ava_jax import losses

Out = dict[str, jax.Array]


def policy(inputs: Arrays, config: dict[str, Any]) -> Out:
    log_probs = plain_log_probs(inputs, config.pop("temperature"))
    names = ("old_log_probs", "ref_log_probs", "sampler_weights")
    arrays = {name: inputs[name] for name in names if name in inputs}
    mask = inputs["attention_mask"]
    loss, _ = losses.policy_loss(
        log_probs, inputs["advantages"], mask, **arrays, **config
    )
    return {"loss": loss}


def rows_of(inputs: Arrays, average: bool) -> jax.Array:
    return losses.sequence_log_probs(
        plain_log_probs(inputs), inputs["attention_mask"], average=average
    )


def dpo(inputs: Arrays, config: dict[str, Any]) -> Out:
    chosen, rejected = jnp.split(rows_of(inputs, config.pop("average")), 2)
    ref_chosen, ref_rejected = jnp.split(inputs["ref"], 2)
    pairs, _ = losses.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, **config)
    return {"loss": pairs.mean()}


def without_reference(loss: Any) -> Call:
    def call(inputs: Arrays, config: dict[str, Any]) -> Out:
        chosen, rejected = jnp.split(rows_of(inputs, config.pop("average")), 2)
        return {"loss": loss(chosen, rejected, **config)[0].mean()}

    return call


def kto(inputs: Arrays, config: dict[str, Any]) -> Out:
    rows, _ = losses.kto_loss(
        rows_of(inputs, average=False),
        inputs["ref"],
        inputs["desirable"],
        inputs.get("kl"),
        **config,
    )
    return {"loss": rows.mean()}


CALLS: dict[str, Call] = {
    "log_probs": log_probs_case(),
    "policy": policy,
    "dpo": dpo,
    "orpo": without_reference(losses.orpo_loss),
    "cpo": without_reference(losses.cpo_loss),
    "simpo": without_reference(losses.simpo_loss),
    "kto": kto,
}
CASES = post_training_cases_of(*CALLS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: PostTrainingCase) -> None:
    check(case, CALLS[case.kind], FLOAT32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64(case: PostTrainingCase) -> None:
    with jax.enable_x64(True):
        check(case, CALLS[case.kind], FLOAT64)


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
    counts = {kind: len(post_training_cases_of(kind)) for kind in CALLS}
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

"""Distillation and the policy term reproduce the reference numbers and gradients."""

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
    post_training_cases_of,
)

import ava_jax
from ava_jax import terms

Out = dict[str, jax.Array]
# What a CPU takes anyway; the others are not traced then.
KERNEL: dict[str, Any] = {"precision": "highest", "implementation": "cpu"}
STUDENT = ("hidden_states", "lm_head")
TEACHER = ("teacher_hidden_states", "teacher_lm_head")


def logits_of(inputs: Arrays, names: tuple[str, str]) -> jax.Array:
    hidden, head = (inputs[name] for name in names)
    return jnp.matmul(hidden, head, precision="highest")


def distil(inputs: Arrays, config: dict[str, Any], student: Arrays) -> Out:
    """Of a student's logits or hidden states, and the teacher that the case has."""
    teacher = {k: v for k, v in inputs.items() if k.startswith("teacher_")}
    if "logits" in student and TEACHER[0] in teacher:
        teacher = {"teacher_logits": logits_of(inputs, TEACHER)}
    mask = inputs["attention_mask"]
    loss, _ = ava_jax.distillation_loss(
        **student, **teacher, attention_mask=mask, **KERNEL, **config
    )
    return {"loss": loss}


def from_hidden_states(inputs: Arrays, config: dict[str, Any]) -> Out:
    return distil(inputs, config, {name: inputs[name] for name in STUDENT})


def from_logits(inputs: Arrays, config: dict[str, Any]) -> Out:
    return distil(inputs, config, {"logits": logits_of(inputs, STUDENT)})


def policy(inputs: Arrays, config: dict[str, Any]) -> Out:
    """The policy loss as a term; a row's advantage is that of each of its tokens."""
    term = terms.PolicyTerm(logits_temperature=config.pop("temperature"), **config)
    vocab_size = inputs["lm_head"].shape[-1]
    loss_fn = ava_jax.compose([term], vocab_size=vocab_size, **KERNEL)
    names = ("old_log_probs", "ref_log_probs", "sampler_weights")
    extra = {name: inputs[name] for name in names if name in inputs}
    targets = inputs["targets"]
    advantages = inputs["advantages"]
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], targets.shape)
    loss, _, _ = loss_fn(
        loss_fn.init(),
        targets=targets,
        hidden_states=inputs["hidden_states"],
        lm_head=inputs["lm_head"],
        attention_mask=inputs["attention_mask"],
        extra_inputs={**extra, "advantages": advantages},
    )
    return {"loss": loss}


def is_of_tokens(case: PostTrainingCase) -> bool:
    of_rows = case.config["kind"] in ("luspo", "vespo")
    return not of_rows and case.config.get("ratio_level") != "sequence"


POLICIES = list(filter(is_of_tokens, post_training_cases_of("policy")))
DISTILLED = post_training_cases_of("distillation", "topk_distillation")
CASES: list[tuple[PostTrainingCase, Call]] = [
    *((case, policy) for case in POLICIES),
    *((case, call) for case in DISTILLED for call in (from_hidden_states, from_logits)),
]
NAMES = [f"{case.name}-{call.__name__}" for case, call in CASES]


@pytest.mark.parametrize(("case", "call"), CASES, ids=NAMES)
def test_float32(case: PostTrainingCase, call: Call) -> None:
    check(case, call, FLOAT32)


@pytest.mark.parametrize(("case", "call"), CASES, ids=NAMES)
def test_float64(case: PostTrainingCase, call: Call) -> None:
    with jax.enable_x64(True):
        check(case, call, FLOAT64)


def test_every_case_is_compared() -> None:
    assert len(POLICIES) == 46
    assert len(post_training_cases_of("distillation")) == 8
    assert len(post_training_cases_of("topk_distillation")) == 3

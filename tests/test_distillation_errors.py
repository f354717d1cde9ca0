"""What does not fit is an error that names the argument and says what to do."""

import jax.numpy as jnp
import pytest
from support.distillation_batches import B, D, E, S, V
from support.loss_checks import untyped

import ava_jax


def z(*shape):
    return jnp.zeros(shape)


LOGITS, TEACHER = {"logits": z(B, S, V)}, {"teacher_logits": z(B, S, V)}
HIDDEN = {"teacher_hidden_states": z(B, S, E), "teacher_lm_head": z(E, V)}
TOP = {
    "teacher_ids": jnp.zeros((B, S, 2), jnp.int32),
    "teacher_log_probs": z(B, S, 2),
}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (TEACHER, r"no logits: pass logits \[B, S, V\], or hidden_states"),
        ({"hidden_states": z(B, S, D), **TEACHER}, "hidden_states .* and lm_head"),
        (LOGITS, "needs one of teacher_hidden_states .* and teacher_logits"),
        (LOGITS | TEACHER | HIDDEN, "needs one of .* got .*'teacher_logits'"),
        (LOGITS | TEACHER | TOP, "teacher_logits.* is given, .* leave it out"),
        (LOGITS | TEACHER | {"teacher_lm_head": z(E, V)}, "teacher_lm_head .* leave"),
        (LOGITS | TOP | {"teacher_lm_head": z(E, V)}, "teacher_lm_head is given"),
        (
            LOGITS | {"teacher_hidden_states": z(B, S, E)},
            r"teacher_hidden_states need teacher_lm_head \[D', V\]",
        ),
        (
            LOGITS | HIDDEN | {"teacher_lm_head": z(E + 1, V)},
            rf"teacher_lm_head must be .* D'={E}",
        ),
        (LOGITS | HIDDEN | {"teacher_lm_head": z(E, V - 1)}, "smaller than vocab_size"),
        (
            LOGITS | HIDDEN | {"teacher_lm_head_bias": z(V + 1)},
            f"teacher_lm_head_bias must be .* V={V}",
        ),
        (LOGITS | {"teacher_logits": z(B, S, V - 1)}, "teacher_logits is 18, smaller"),
        (LOGITS | {"teacher_logits": z(B, S + 1, V)}, "teacher_logits.* shape"),
        (LOGITS | {"teacher_logits": z(B, S)}, r"teacher_logits must be \[B, S, W\]"),
        (LOGITS | {"teacher_ids": TOP["teacher_ids"]}, "needs .*teacher_log_probs"),
        (
            LOGITS | {"teacher_log_probs": TOP["teacher_log_probs"]},
            "needs .*teacher_ids",
        ),
        (
            LOGITS | TOP | {"teacher_log_probs": z(B, S, 3)},
            "teacher_ids must have the shape",
        ),
        (LOGITS | TOP | {"beta": 0.5}, "leave out beta"),
        (LOGITS | TOP | {"teacher_logit_soft_cap": 2.0}, "teacher_logit_soft_cap"),
        (LOGITS | TEACHER | {"tail": True}, "tail is for teacher_ids"),
        (LOGITS | TEACHER | {"tail": False}, "tail is for teacher_ids"),
        (LOGITS | TEACHER | {"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        (LOGITS | TEACHER | {"beta": 1.5}, r"beta must be in \[0, 1\], got 1.5"),
        (LOGITS | TEACHER | {"beta": float("nan")}, "beta must be"),
        (LOGITS | TEACHER | {"temperature": 0.0}, "^temperature must be .* got 0"),
        (LOGITS | TEACHER | {"temperature": -1.0}, "^temperature must be"),
        (LOGITS | TOP | {"temperature": float("inf")}, "^temperature must be"),
        (LOGITS | TEACHER | {"teacher_logit_soft_cap": 0.0}, "teacher_logit_soft_cap"),
        (LOGITS | TEACHER | {"attention_mask": z(B, S + 1)}, "attention_mask must"),
        (LOGITS | TEACHER | {"hidden_states": z(B, S, D)}, "got logits and hidden_s"),
        (LOGITS | TEACHER | {"lm_head": z(D, V)}, "either logits or hidden_states"),
        (LOGITS | TEACHER | {"vocab_size": V + 1}, "smaller than vocab_size=20"),
    ],
)
def test_errors_say_what_to_do(given, words):
    with untyped(), pytest.raises(ValueError, match=words):
        ava_jax.distillation_loss(**given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (LOGITS | TOP | {"teacher_ids": z(B, S, 2)}, "teacher_ids must be integers"),
        (
            LOGITS | {"teacher_logits": jnp.zeros((B, S, V), jnp.int32)},
            "teacher_logits must be floating",
        ),
        (
            LOGITS | HIDDEN | {"teacher_lm_head": jnp.zeros((E, V), jnp.int32)},
            "teacher_lm_head must be floating",
        ),
    ],
)
def test_wrong_dtypes_are_named(given, words):
    with untyped(), pytest.raises(TypeError, match=words):
        ava_jax.distillation_loss(**given)

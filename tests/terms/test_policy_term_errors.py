"""A policy term that cannot be, or lacks its arrays, says what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.loss_checks import untyped

import ava_jax
from ava_jax import terms

B, S, V = 4, 6, 13
KL = {"kl_weight": 0.3}
CONSTANTS = ("old_log_probs", "ref_log_probs", "sampler_weights")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "luspo"}, "'luspo' .* use token_log_probs and losses.policy_loss"),
        ({"kind": "vespo"}, "'vespo' .* use token_log_probs and losses.policy_loss"),
        ({"kind": "grop"}, "did you mean 'grpo'"),
        ({"kind": "dr_grpo"}, "max_length"),
        ({"max_length": 5}, "max_length"),
        ({"logits_temperature": 0.0}, "logits_temperature must be .* got 0"),
        ({"logits_temperature": -1.0}, "logits_temperature must be"),
        ({"logits_temperature": float("nan")}, "logits_temperature must be"),
        ({"logits_temperature": float("inf")}, "logits_temperature must be"),
    ],
)
def test_a_bad_term_is_an_error(options, words):
    with untyped(), pytest.raises(ValueError, match=words):
        terms.PolicyTerm(**options)


def without(name):
    return lambda extra: {k: v for k, v in extra.items() if k != name}


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ({}, without("advantages"), r"needs extra_inputs\['advantages'\], \[B, S"),
        ({}, lambda _: None, r"needs extra_inputs\['advantages'\]"),
        (KL, without("ref_log_probs"), r"needs extra_inputs\['ref_log_probs'\]"),
        (
            {"kl_estimator": "k1"},
            without("ref_log_probs"),
            r"needs extra_inputs\['ref_log_probs'\]",
        ),
        (
            {},
            lambda extra: {**extra, "reward": extra["advantages"]},
            r"extra_inputs\['reward'\] is given, but no term reads it.*leave it out",
        ),
        (
            {},
            lambda extra: {**extra, "advantages": extra["advantages"][:, 0]},
            r"extra_inputs\['advantages'\] must start with the shape \(4, 6\)",
        ),
        (
            {},
            lambda extra: {**extra, "old_log_probs": extra["advantages"][..., None]},
            r"extra_inputs\['old_log_probs'\] must have the shape \(4, 6\)",
        ),
        ({"kind": "sapo", "ratio_cap": 2.0}, dict, "ratio_cap is given, but kind"),
        ({"clip_low": -0.1}, dict, "clip_low must be"),
        ({"kl_estimator": "k4"}, dict, "unknown kl_estimator 'k4'"),
    ],
)
def test_what_does_not_fit_is_an_error(options, change, words):
    extra = dict.fromkeys(("advantages", *CONSTANTS), np.ones((B, S), np.float32))

    def call(extra):
        loss_fn = ava_jax.compose([terms.PolicyTerm(**options)], vocab_size=V)
        return loss_fn(
            loss_fn.init(),
            targets=jnp.ones((B, S), jnp.int32),
            logits=jnp.zeros((B, S, V)),
            extra_inputs=extra,
        )

    with untyped(), pytest.raises(ValueError, match=words):
        jax.eval_shape(call, change(extra))

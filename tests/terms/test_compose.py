"""A loss from a list of terms is the loss of the flat config with those terms."""

import chex
import jax.numpy as jnp
import pytest
from support.scenes import (
    ADAPTIVE,
    EVERYTHING,
    B,
    D,
    S,
    V,
    adaptive_floats,
    floats,
    integers,
    jitted,
    through,
)

import ava_jax
from ava_jax import terms

TARGETS = jnp.ones((B, S), jnp.int32)
LOGITS = jnp.zeros((B, S, V))
HIDDEN = jnp.zeros((B, S, D))
HEAD = jnp.zeros((D, V))


def test_the_same_terms_are_the_same_loss():
    config = ava_jax.UnifiedLossConfig(**EVERYTHING)
    listed = terms.terms_of(config)
    composed = ava_jax.compose(listed, vocab_size=V, eos_token_id=2)
    inputs = {**through("logits", floats()), **integers()}
    whole = ava_jax.unified_loss(config)
    want = jitted(whole)(whole.init(), inputs)
    chex.assert_trees_all_equal(jitted(composed)(composed.init(), inputs), want)
    assert [term.name for term in listed][:2] == ["cross_entropy", "z_loss"]


def test_every_term_of_aux_is_named_by_its_class():
    """No key of aux is unknown to the class that makes it."""
    for config, inputs in (
        (EVERYTHING, {**through("logits", floats()), **integers()}),
        (ADAPTIVE, {**adaptive_floats(), **integers(experts=False)}),
    ):
        loss_fn = ava_jax.create_unified_loss(config)
        _, aux, _ = jitted(loss_fn)(loss_fn.init(), inputs)
        counts = {"num_tokens", "num_invalid_targets", "num_invalid_weights"}
        always = {*counts, "nll", "accuracy", "entropy"}
        always |= {"total_loss", "main_loss", "perplexity"}
        assert set(aux) == always.union(
            *({*term.keys, *getattr(term, "measured", ())} for term in loss_fn.terms)
        )


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ([], "at least one term"),
        ([terms.ZLoss(0.1), terms.ZLoss(0.2)], "'z_loss' is taken"),
        (
            [
                terms.TemperedCrossEntropy(),
                terms.TemperedFocalLoss(),
            ],
            "temperature",
        ),
    ],
)
def test_terms_that_do_not_go_together(listed, message):
    with pytest.raises(ValueError, match=message):
        ava_jax.compose(listed, vocab_size=V)


UNREAD = {
    "primary_logits": LOGITS,
    "additional_logits": LOGITS[None],
    "confidence_scores": jnp.ones((B,)),
    "mtp_active": True,
    "mtp_params": {"norm": {}, "heads": {}},
    "mtp_hidden_states": HIDDEN[None],
    "gate_logits": jnp.zeros((B, S, 3)),
    "expert_indices": jnp.zeros((B, S, 1), jnp.int32),
    "expert_outputs": jnp.zeros((3, B, S, 4)),
    "embeddings": jnp.zeros((B, D)),
    "labels": jnp.zeros((B,), jnp.int32),
    "extra_inputs": {"reward": jnp.ones((B, S))},
}


@pytest.mark.parametrize("path", ["logits", "fused"])
@pytest.mark.parametrize("name", list(UNREAD))
def test_an_argument_that_nothing_reads_is_an_error(name, path):
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V})
    sources = {"logits": LOGITS}
    if path == "fused":
        sources = {"hidden_states": HIDDEN, "lm_head": HEAD}
    given = {**sources, name: UNREAD[name]}
    with pytest.raises(ValueError, match=f"{name} is given, but nothing"):
        loss_fn(loss_fn.init(), targets=TARGETS, **given)


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (
            {},
            {"logits": LOGITS, "hidden_states": HIDDEN},
            "hidden_states is given|not both",
        ),
        ({}, {"logits": LOGITS, "lm_head_bias": jnp.zeros(V)}, "lm_head_bias needs"),
        (
            {"primary_loss_type": "adaptive_mtp"},
            {"primary_logits": LOGITS, "hidden_states": HIDDEN, "lm_head": HEAD},
            "hidden_states is given|not both",
        ),
        (
            {"use_contrastive_loss": True, "contrastive_type": "simctg"},
            {
                "hidden_states": HIDDEN,
                "lm_head": HEAD,
                "labels": jnp.zeros((B,), jnp.int32),
            },
            "labels is given",
        ),
        (
            {"use_mtp": True, "mtp_type": "sequential", "num_future_tokens": 1},
            {
                "logits": LOGITS,
                "hidden_states": HIDDEN,
                "mtp_hidden_states": HIDDEN[None],
                "lm_head": HEAD,
            },
            "hidden_states is given|not both",
        ),
    ],
)
def test_arguments_that_contradict_each_other(config, given, message):
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V, **config})
    with pytest.raises(ValueError, match=message):
        loss_fn(loss_fn.init(), targets=TARGETS, **given)


def test_logits_that_do_not_fit_the_targets_name_both():
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V})
    with pytest.raises(ValueError, match=r"logits .*\(4, 9\).*targets.*\(4, 7, 13\)"):
        loss_fn(loss_fn.init(), targets=TARGETS, logits=LOGITS[:, :7])


def test_deepseek_is_another_name_of_parallel_heads():
    one, two = (
        ava_jax.UnifiedLossConfig(
            vocab_size=V, use_mtp=True, hidden_size=D, mtp_type=kind
        )
        for kind in ("deepseek", "parallel")
    )
    assert one == two
    assert one.mtp_type == "parallel"

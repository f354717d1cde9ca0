"""Penzai's Llama-like transformer in its own trainer: only the loss line is swapped."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from support.model_checks import (
    EVERYTHING_SETTINGS,
    PLAIN,
    PLAIN_SETTINGS,
    REASON,
    STEPS,
    Batch,
    D,
    Line,
    Run,
    S,
    Setting,
    V,
    batch_of,
    check_everything_learns,
    check_plain_is_optax,
    check_smoothing_gets_mesh_apart,
    mtp_params,
    run_of,
)

import ava_jax

pz = pytest.importorskip("penzai.pz", reason=REASON)
llama = pytest.importorskip(
    "penzai.models.transformer.variants.llamalike_common", reason=REASON
)
training = pytest.importorskip("penzai.toolshed.basic_training", reason=REASON)


def build(**fields: Any) -> Any:
    """A tiny model, with these fields of its config."""
    config = llama.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=D,
        projection_dim=D // 2,
        mlp_hidden_dim=2 * D,
        vocab_size=V,
        **fields,
    )
    return llama.build_llamalike_transformer(config, jax.random.key(0))


def make(setting: Setting) -> dict[str, Any]:
    """The model beside the heads' parameters."""
    built = build(
        num_decoder_blocks=2,
        mlp_variant="swiglu",
        tie_embedder_and_logits=setting.tied,
        activation_dtype=jnp.dtype(setting.dtype),
    )
    model = {"model": built}
    if setting.mtp:
        model["mtp"] = pz.Parameter(value=mtp_params(), label="mtp")
    for parameter in pz.unbind_params(model)[1]:
        cast = jax.tree.map(lambda x: x.astype(setting.dtype), parameter.value)
        parameter.value = cast
    return model


def outputs_of(model: dict[str, Any], ids: jax.Array, setting: Setting) -> Any:
    """What the model gives to the loss line; it is causal and takes no mask."""
    tokens, positions = pz.nx.wrap(ids[:, :-1], "batch", "seq"), pz.nx.arange("seq", S)
    *body, last = model["model"].body.sublayers
    named = pz.nn.Sequential(body)(tokens, token_positions=positions)
    hidden = {"hidden_states": named.unwrap("batch", "seq", "embedding")}
    mtp = hidden | {"mtp_params": model["mtp"].value} if setting.mtp else {}
    if setting.path == "logits":
        logits = model["model"](tokens).unwrap("batch", "seq", "vocabulary")
        return {"logits": logits} | mtp
    table = last.table.embeddings if setting.tied else last.weights
    return hidden | {"lm_head": table.value.unwrap("embedding", "vocabulary")} | mtp


def train(line: Line, state: Any, setting: Setting) -> Run:
    model = make(setting)

    def loss_fn(*, model: Any, state: Any, rng: jax.Array, batch: Batch) -> Any:
        outputs = outputs_of(model, batch.ids, setting)
        loss, aux, state = line(state, *batch, **outputs)
        return loss, state, (loss, aux)

    trainer = training.StatefulTrainer.build(
        root_rng=jax.random.key(1),
        model=model,
        optimizer_def=setting.optimizer,
        loss_fn=loss_fn,
        initial_loss_fn_state=state,
    )
    history = [trainer.step(batch=batch_of(step, setting)) for step in range(STEPS)]
    params = {p.label: p.value for p in pz.unbind_params(model, freeze=True)[1]}
    return run_of(history, params, trainer.state.value.loss_fn_state)


@PLAIN_SETTINGS
def test_plain_is_optax(setting: Setting) -> None:
    check_plain_is_optax(train, setting)


def test_smoothing_gets_mesh_apart() -> None:
    check_smoothing_gets_mesh_apart(train)


@EVERYTHING_SETTINGS
def test_everything_learns(setting: Setting) -> None:
    check_everything_learns(train, setting)


def test_a_tied_head_with_a_final_cap_is_optax() -> None:
    """The last layers are the head and a `TanhSoftCap`; the loss takes both over."""
    model = build(
        num_decoder_blocks=1,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
        final_logit_softcap=30.0,
    )
    ids = batch_of(0, Setting()).ids
    tokens, positions = pz.nx.wrap(ids[:, :-1], "batch", "seq"), pz.nx.arange("seq", S)
    *body, head, _ = model.body.sublayers
    # So large that the cap bends the logits.
    table = head.table.embeddings
    table.value = jax.tree.map(lambda x: 2 * x / jnp.std(x), table.value)
    logits = model(tokens, token_positions=positions)
    logits = logits.unwrap("batch", "seq", "vocabulary")
    assert 15 < abs(logits).max() < 30
    named = pz.nn.Sequential(body)(tokens, token_positions=positions)
    loss_fn = ava_jax.create_unified_loss(PLAIN, logit_soft_cap=30.0)
    loss, _, _ = loss_fn(
        loss_fn.init(),
        hidden_states=named.unwrap("batch", "seq", "embedding"),
        lm_head=table.value.unwrap("embedding", "vocabulary"),
        targets=ids[:, 1:],
    )
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    assert float(loss) == pytest.approx(float(nll.mean()), rel=1e-5)

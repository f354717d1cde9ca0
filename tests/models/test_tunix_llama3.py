"""Llama3 of google-tunix, an NNX model: only the loss line is swapped."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from support.model_checks import (
    EVERYTHING_SETTINGS,
    PLAIN_SETTINGS,
    TUNIX_WARNINGS,
    Batch,
    D,
    K,
    Setting,
    V,
    check_everything_learns,
    check_plain_is_optax,
    check_smoothing_gets_mesh_apart,
    nnx_trainer,
)
from support.tunix_checks import hidden_of, llama, masks_of, redraw

from ava_jax.heads import MTPHeads, NNXHeads

pytestmark = TUNIX_WARNINGS


def make(setting: Setting) -> nnx.Module:
    """The model, with the heads as one more layer."""
    model = llama(num_layers=2, weight_tying=setting.tied)
    if setting.mtp:
        heads, width = MTPHeads(num_heads=K, vocab_size=V), jnp.zeros((1, 1, D))
        model.mtp = NNXHeads(heads, width, rngs=nnx.Rngs(1))
    return redraw(model, "mlp", 0.1, seed=2, dtype=setting.dtype)


def outputs_of(model: Any, batch: Batch, setting: Setting) -> dict[str, Any]:
    """What the model gives to the loss line."""
    ids, mask = batch.ids[:, :-1], batch.mask[:, :-1]
    positions, attention = masks_of(mask)
    hidden = {"hidden_states": hidden_of(model, ids, positions, attention)}
    mtp = hidden | {"mtp_params": model.mtp.params} if setting.mtp else {}
    if setting.path == "logits":
        return {"logits": model(ids, positions, None, attention)[0]} | mtp
    if setting.tied:
        head = model.embedder.input_embedding[...].T
    else:
        head = model.lm_head.w[...]
    return hidden | {"lm_head": head} | mtp


train = nnx_trainer(make, outputs_of)


@PLAIN_SETTINGS
def test_plain_is_optax(setting: Setting) -> None:
    check_plain_is_optax(train, setting)


def test_smoothing_gets_mesh_apart() -> None:
    check_smoothing_gets_mesh_apart(train)


@EVERYTHING_SETTINGS
def test_everything_learns(setting: Setting) -> None:
    check_everything_learns(train, setting)

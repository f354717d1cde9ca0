"""Llama3 of google-tunix, an NNX model: only the loss line is swapped."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from support.model_checks import (
    EVERYTHING_SETTINGS,
    PLAIN_SETTINGS,
    REASON,
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

from ava_jax.heads import MTPHeads, NNXHeads

llama3 = pytest.importorskip("tunix.models.llama3.model", reason=REASON)
tunix = pytest.importorskip("tunix.sft.utils", reason=REASON)

pytestmark = TUNIX_WARNINGS


def make(setting: Setting) -> nnx.Module:
    """The model, with the heads as one more layer."""
    config = llama3.ModelConfig(
        num_layers=2,
        vocab_size=V,
        embed_dim=D,
        hidden_dim=2 * D,
        num_heads=2,
        head_dim=D // 2,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=setting.tied,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    if setting.mtp:
        heads, width = MTPHeads(num_heads=K, vocab_size=V), jnp.zeros((1, 1, D))
        model.mtp = NNXHeads(heads, width, rngs=nnx.Rngs(1))
    rngs = nnx.Rngs(2)

    def ready(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        # Tunix expects a checkpoint: its feed-forward layers start at 0, where their
        # gradient is 0 too, so that they would never move.
        start = 0.1 * rngs.params.normal(x.shape) if "mlp" in path else x
        return start.astype(setting.dtype)

    nnx.update(model, nnx.map_state(ready, nnx.state(model, nnx.Param)))
    return model


def outputs_of(model: Any, batch: Batch, setting: Setting) -> dict[str, Any]:
    """What the model gives to the loss line."""
    ids, mask = batch.ids[:, :-1], batch.mask[:, :-1]
    positions = tunix.build_positions_from_mask(mask)
    attention = tunix.make_causal_attn_mask(mask)
    x = model.embedder.encode(ids)
    for layer in model.layers:
        _, x = layer(x, positions, None, attention)
    hidden = {"hidden_states": model.final_norm(x)}
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

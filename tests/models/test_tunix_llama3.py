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
    STEPS,
    TUNIX_WARNINGS,
    Batch,
    D,
    K,
    Line,
    Run,
    Setting,
    V,
    batch_of,
    check_everything_learns,
    check_plain_is_optax,
    check_smoothing_gets_mesh_apart,
    run_of,
)

from ava_jax.heads import MTPHeads

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
        heads = MTPHeads(num_heads=K, vocab_size=V)
        model.mtp = nnx.bridge.ToNNX(heads, rngs=nnx.Rngs(1))
        model.mtp.lazy_init(jnp.zeros((1, 1, D)))
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
    mtp = {}
    if setting.mtp:
        params = nnx.to_pure_dict(nnx.state(model.mtp, nnx.Param))
        mtp = hidden | {"mtp_params": params}
    if setting.path == "logits":
        return {"logits": model(ids, positions, None, attention)[0]} | mtp
    if setting.tied:
        head = model.embedder.input_embedding[...].T
    else:
        head = model.lm_head.w[...]
    return hidden | {"lm_head": head} | mtp


def train(line: Line, state: Any, setting: Setting) -> Run:
    model = make(setting)
    optimizer = nnx.Optimizer(model, setting.optimizer, wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any, state: Any, batch: Batch) -> Any:
        def objective(model: Any) -> Any:
            outputs = outputs_of(model, batch, setting)
            loss, aux, new_state = line(state, *batch, **outputs)
            return loss, (aux, new_state)

        graded = nnx.value_and_grad(objective, has_aux=True)
        (loss, (aux, new_state)), grads = graded(model)
        optimizer.update(model, grads)
        return new_state, (loss, aux)

    history = []
    for number in range(STEPS):
        state, reported = step(model, optimizer, state, batch_of(number, setting))
        history.append(reported)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return run_of(history, params, state)


@PLAIN_SETTINGS
def test_plain_is_optax(setting: Setting) -> None:
    check_plain_is_optax(train, setting)


def test_smoothing_gets_mesh_apart() -> None:
    check_smoothing_gets_mesh_apart(train)


@EVERYTHING_SETTINGS
def test_everything_learns(setting: Setting) -> None:
    check_everything_learns(train, setting)

"""FlaxGPT2 of transformers, a Linen model: only the loss line is swapped."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import NDArray
from support.model_checks import (
    EVERYTHING_SETTINGS,
    PLAIN,
    PLAIN_SETTINGS,
    REASON,
    STEPS,
    B,
    Batch,
    D,
    Line,
    Run,
    S,
    Setting,
    V,
    ava_line,
    batch_of,
    by_path,
    check_everything_learns,
    check_plain_is_optax,
    check_smoothing_gets_mesh_apart,
    mtp_params,
    optax_line,
    run_of,
)

import ava_jax

gpt2 = pytest.importorskip("transformers.models.gpt2.modeling_flax_gpt2", reason=REASON)


def make(setting: Setting) -> tuple[Any, dict[str, Any]]:
    """The model, and its parameters beside the heads'."""
    config = gpt2.GPT2Config(
        vocab_size=V,
        n_positions=S,
        n_embd=D,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=setting.tied,
    )
    model = gpt2.FlaxGPT2LMHeadModel(config, dtype=jnp.dtype(setting.dtype))
    params = {"model": model.params}
    if setting.mtp:
        params["mtp"] = mtp_params()
    return model, jax.tree.map(lambda x: x.astype(setting.dtype), params)


def outputs_of(
    model: Any, params: dict[str, Any], batch: Batch, key: jax.Array, setting: Setting
) -> dict[str, Any]:
    """What the model gives to the loss line; dropout is on."""
    output = model(
        batch.ids[:, :-1],
        attention_mask=batch.mask[:, :-1],
        params=params["model"],
        dropout_rng=key,
        train=True,
        output_hidden_states=True,
    )
    hidden = {"hidden_states": output.hidden_states[-1]}
    mtp = hidden | {"mtp_params": params["mtp"]} if setting.mtp else {}
    if setting.path == "logits":
        return {"logits": output.logits} | mtp
    if setting.tied:
        head = params["model"]["transformer"]["wte"]["embedding"].T
    else:
        head = params["model"]["lm_head"]["kernel"]
    return hidden | {"lm_head": head} | mtp


def train(line: Line, state: Any, setting: Setting) -> Run:
    model, params = make(setting)
    optimizer = setting.optimizer

    @jax.jit
    def step(params: Any, opt_state: Any, state: Any, batch: Batch, key: Any) -> Any:
        def objective(params: Any) -> Any:
            outputs = outputs_of(model, params, batch, key, setting)
            loss, aux, new_state = line(state, *batch, **outputs)
            return loss, (aux, new_state)

        graded = jax.value_and_grad(objective, has_aux=True)
        (loss, (aux, new_state)), grads = graded(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, new_state, (loss, aux)

    opt_state, history = optimizer.init(params), []
    for number in range(STEPS):
        params, opt_state, state, reported = step(
            params, opt_state, state, batch_of(number, setting), jax.random.key(number)
        )
        history.append(reported)
    return run_of(history, params, state)


@PLAIN_SETTINGS
def test_plain_is_optax(setting: Setting) -> None:
    check_plain_is_optax(train, setting)


def test_smoothing_gets_mesh_apart() -> None:
    check_smoothing_gets_mesh_apart(train)


@EVERYTHING_SETTINGS
def test_everything_learns(setting: Setting) -> None:
    check_everything_learns(train, setting)


def gradients(setting: Setting) -> dict[str, NDArray]:
    """Those of the usual loss, by path."""
    with jax.enable_x64(setting.dtype == "float64"):
        model, params = make(setting)
        batch = batch_of(0, setting)

        @jax.jit
        @jax.grad
        def graded(params: Any) -> jax.Array:
            outputs = outputs_of(model, params, batch, jax.random.key(0), setting)
            return optax_line(None, *batch, **outputs)[0]

        return by_path(graded(params))


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-8), ("float64", 1e-16)])
def test_the_gradient_of_a_keys_bias_is_rounding(dtype: Any, bound: float) -> None:
    """Why float32 needs a larger epsilon: see `Setting.optimizer`."""
    bias = "['model']['transformer']['h']['0']['attn']['c_attn']['bias']"
    _, key, value = np.split(gradients(Setting(dtype=dtype))[bias], 3)
    assert 0 < abs(key).max() < bound
    assert abs(value).max() > 1e-4


@pytest.mark.parametrize(("path", "made"), [("logits", True), ("fused", False)])
def test_unread_logits_are_not_made(path: Any, made: bool) -> None:
    setting = Setting(path, tied=True)
    model, params = make(setting)
    loss_fn = ava_jax.create_unified_loss(PLAIN, chunk_size=4)
    line = ava_line(loss_fn)

    def objective(params: Any, batch: Batch) -> jax.Array:
        outputs = outputs_of(model, params, batch, jax.random.key(0), setting)
        return line(loss_fn.init(), *batch, **outputs)[0]

    graded = jax.jit(jax.grad(objective)).lower(params, batch_of(0, setting))
    assert (f"[{B},{S},{V}]" in str(graded.compile().as_text())) == made

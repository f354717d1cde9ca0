"""What the tests of Tunix share: a tiny Llama3, its inputs, and runs to compare."""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.typing import DTypeLike
from numpy.typing import NDArray

from support.model_checks import REASON, D, V, by_path

llama3 = pytest.importorskip("tunix.models.llama3.model", reason=REASON)
utils = pytest.importorskip("tunix.sft.utils", reason=REASON)

PAD = 0
STEPS, B, P, C = 6, 4, 5, 8  # steps, rows, tokens of a prompt and of a completion


class Run(NamedTuple):
    """The loss of every step and other metrics, and the parameters after them."""

    history: dict[str, NDArray]
    params: dict[str, NDArray]


def llama(seed: int = 0, **fields: Any) -> Any:
    """The model; fields of its config over those of the tiny one."""
    tiny = {
        "num_layers": 1,
        "vocab_size": V,
        "embed_dim": D,
        "hidden_dim": 2 * D,
        "num_heads": 2,
        "head_dim": D // 2,
        "num_kv_heads": 1,
        "rope_theta": 10_000,
        "norm_eps": 1e-5,
        "weight_tying": False,
    }
    config = llama3.ModelConfig(**(tiny | fields))
    return llama3.Llama3(config, rngs=nnx.Rngs(seed))


def redraw(
    model: Any, layer: str, scale: float, seed: int, dtype: DTypeLike = jnp.float32
) -> Any:
    """Draws a layer's parameters anew, and casts all of them.

    Tunix expects a checkpoint: its feed-forward layers start at 0, where their gradient
    is 0 too, so that they would never move.
    """
    rngs = nnx.Rngs(seed)

    def ready(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        start = scale * rngs.params.normal(x.shape) if layer in path else x
        return start.astype(dtype)

    nnx.update(model, nnx.map_state(ready, nnx.state(model, nnx.Param)))
    return model


def make(seed: int = 0) -> Any:
    """The model that the trainers train."""
    return redraw(llama(seed), "mlp", 0.1, seed + 1)


def masks_of(mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The positions of the tokens, and which of them attend to which."""
    return utils.build_positions_from_mask(mask), utils.make_causal_attn_mask(mask)


def hidden_of(
    model: Any, ids: jax.Array, positions: jax.Array, attention: jax.Array
) -> jax.Array:
    """What the model multiplies with its head."""
    x = model.embedder.encode(ids)
    for layer in model.layers:
        _, x = layer(x, positions, None, attention)
    return model.final_norm(x)


class Fused(TypedDict):
    """What the losses take from the model."""

    targets: jax.Array
    hidden_states: jax.Array
    lm_head: jax.Array


def fused_of(model: Any, ids: jax.Array, mask: jax.Array, keep: int) -> Fused:
    """Targets and hidden states of the last tokens of each row, and the head.

    Position t of the hidden states predicts token t + 1.
    """
    hidden = hidden_of(model, ids, *masks_of(mask))
    return {
        "targets": ids[:, -keep:],
        "hidden_states": hidden[:, -keep - 1 : -1],
        "lm_head": model.lm_head.w[...],
    }


def optimizer() -> optax.GradientTransformation:
    """Adam, with an epsilon that leaves rounding small: see `Setting.optimizer`."""
    return optax.adam(1e-3, eps=1e-5)


def run_of(trainer: Any, prefix: str = "", metrics: Iterable[str] = ()) -> Run:
    history = trainer.metrics_logger.get_metric_history
    values = {name: history(prefix, name, "train") for name in ("loss", *metrics)}
    params = by_path(nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)))
    return Run({k: np.asarray(x, np.float64) for k, x in values.items()}, params)


def differences(own: Run, theirs: Run) -> tuple[float, float]:
    """The largest of a loss, relative to the largest loss, and of an array's norm.

    GRPO's losses may be near 0, as differences of numbers near 1: advantages sum to 0.
    """
    assert set(own.params) == set(theirs.params)
    of_params = [
        float(np.linalg.norm(own.params[name] - x) / np.linalg.norm(x))
        for name, x in theirs.params.items()
    ]
    expected = theirs.history["loss"]
    gaps = abs(own.history["loss"] - expected) / abs(expected).max()
    return float(gaps.max()), max(of_params)


def check_same(own: Run, theirs: Run, steps: int = STEPS) -> None:
    """All within 1e-5 of theirs, relatively; and every parameter has moved by more."""
    assert len(theirs.history["loss"]) == steps
    start = by_path(nnx.to_pure_dict(nnx.state(make(), nnx.Param)))
    for name, x in theirs.params.items():
        assert np.linalg.norm(start[name] - x) / np.linalg.norm(x) > 1e-3, name
    found = differences(own, theirs)
    assert max(found) < 1e-5
    for name, x in theirs.history.items():
        np.testing.assert_allclose(own.history[name], x, rtol=1e-4, atol=1e-5)

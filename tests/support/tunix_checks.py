"""What the tests of Tunix's trainers share: a tiny Llama3, and runs to compare."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx
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


def make(seed: int = 0) -> Any:
    """The model; its feed-forward layers, which start at 0, are drawn anew."""
    config = llama3.ModelConfig(
        num_layers=1,
        vocab_size=V,
        embed_dim=D,
        hidden_dim=2 * D,
        num_heads=2,
        head_dim=D // 2,
        num_kv_heads=1,
        rope_theta=10_000,
        norm_eps=1e-5,
        weight_tying=False,
    )
    model = llama3.Llama3(config, rngs=nnx.Rngs(seed))
    rngs = nnx.Rngs(seed + 1)

    def drawn(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return 0.1 * rngs.params.normal(x.shape) if "mlp" in path else x

    nnx.update(model, nnx.map_state(drawn, nnx.state(model, nnx.Param)))
    return model


def hidden_of(
    model: Any, ids: jax.Array, positions: jax.Array, attention: jax.Array
) -> jax.Array:
    """What the model multiplies with its head."""
    x = model.embedder.encode(ids)
    for layer in model.layers:
        _, x = layer(x, positions, None, attention)
    return model.final_norm(x)


def fused_of(model: Any, ids: jax.Array, mask: jax.Array, keep: int) -> dict[str, Any]:
    """Targets and hidden states of the last tokens of each row, and the head."""
    positions = utils.build_positions_from_mask(mask)
    attention = utils.make_causal_attn_mask(mask)
    hidden = hidden_of(model, ids, positions, attention)
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

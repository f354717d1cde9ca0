"""All head modules: mixed precision, jit, bad options and shapes."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.head_checks import (
    B,
    CausalBlock,
    D,
    DenseBlock,
    K,
    S,
    V,
    adaptive,
    apply,
    init,
    made,
    normal,
    randomized,
)
from support.loss_checks import untyped

from ava_jax.heads import ConfidenceGate, MTPHeads, SequentialMTP


def build(name: str, **options: Any) -> tuple[nn.Module, int]:
    """The module and how many [B, S, D] arrays it takes."""
    match name:
        case "heads":
            return MTPHeads(K, V, "mlp", **options), 1
        case "shared":
            return MTPHeads(K, V, "mlp", share_projections=True, **options), 1
        case "gate":
            return ConfidenceGate((5,), use_attention_pooling=True, **options), 1
        case "adaptive":
            return adaptive(confidence_threshold=0.0, **options), 1
        case _:
            return SequentialMTP(2, DenseBlock, use_final_norm=True, **options), 2


BUILT_BLOCK: Any = CausalBlock()
MODULES = ("heads", "shared", "gate", "adaptive", "sequential")


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_compute_keeps_float32_parameters(name: str) -> None:
    module, count = build(name, dtype=jnp.bfloat16)
    exact, _ = build(name)
    inputs = [normal(B, S, D, seed=i) for i in range(count)]
    dtypes = {x.dtype for x in jax.tree.leaves(made(module, *inputs))}
    assert dtypes == {jnp.dtype("float32")}
    variables = jax.tree.map(lambda x: 0.3 * x, init(module, *inputs))
    got, want = apply(module, variables, *inputs), apply(exact, variables, *inputs)
    for half, full in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_allclose(
            half.astype("float32"), full.astype("float32"), atol=0.06
        )
    outputs = vars(got) if name == "adaptive" else {name: got}
    dtypes = {key: value.dtype for key, value in outputs.items()}
    expected = {"gate": "float32", "confidence_scores": "float32", "mtp_active": "bool"}
    assert dtypes == {key: expected.get(key, "bfloat16") for key in dtypes}


@pytest.mark.parametrize("name", MODULES)
def test_layers_follow_the_dtype_of_the_input(name: str) -> None:
    module, count = build(name, param_dtype=jnp.bfloat16)
    inputs = [normal(B, S, D, dtype="bfloat16", seed=i) for i in range(count)]
    params = made(module, *inputs)
    own = [params[name] for name in params if not name.startswith("block")]
    assert {x.dtype for x in jax.tree.leaves(own)} == {jnp.dtype(jnp.bfloat16)}
    variables = {"params": randomized(params, 0, "bfloat16")}
    first = jax.tree.leaves(apply(module, variables, *inputs))[0]
    assert first.dtype == ("float32" if name == "gate" else "bfloat16")


@pytest.mark.parametrize("name", MODULES)
def test_jit_changes_nothing(name: str) -> None:
    module, count = build(name)
    inputs = [normal(B, S, D, seed=i) for i in range(count)]
    variables = init(module, *inputs)
    chex.assert_trees_all_close(
        jax.jit(functools.partial(apply, module))(variables, *inputs),
        apply(module, variables, *inputs),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MTPHeads(0, V), "num_heads must be at least 1, got 0"),
        (lambda: MTPHeads(K, 0), "vocab_size must be at least 1, got 0"),
        (
            lambda: MTPHeads(K, V, "conv"),
            "head_type must be one of 'linear', 'mlp', got 'conv'",
        ),
        (
            lambda: MTPHeads(K, V, "mlp", intermediate_size=0),
            "intermediate_size must be at least 1, got 0",
        ),
        (
            lambda: MTPHeads(K, V, "mlp", dropout_rate=1.0),
            r"dropout_rate must be in \[0, 1\), got 1.0",
        ),
        (
            lambda: MTPHeads(K, V, dropout_rate=0.1),
            "dropout_rate must be 0 with head_type='linear', got 0.1",
        ),
        (
            lambda: ConfidenceGate((3, 0)),
            r"gate_hidden_dims must be at least 1 each, got \(3, 0\)",
        ),
        (
            lambda: ConfidenceGate(activation="tanh"),
            "activation must be one of 'gelu', 'relu', 'silu', got 'tanh'",
        ),
        (lambda: ConfidenceGate(dropout_rate=-0.1), "dropout_rate .* got -0.1"),
        (lambda: ConfidenceGate(initial_confidence=1.0), "initial_confidence .* 1.0"),
        (
            lambda: ConfidenceGate(per_token=True, use_attention_pooling=True),
            "use_attention_pooling must be False with per_token=True, got True",
        ),
        (lambda: adaptive(confidence_threshold=1.5), "confidence_threshold .* 1.5"),
        (lambda: adaptive(warmup_steps=-1), "warmup_steps must be at least 0, got -1"),
        (lambda: adaptive(head_type="conv"), "head_type must be one of"),
        (lambda: adaptive(activation="tanh"), "activation must be one of"),
        (lambda: SequentialMTP(0, CausalBlock), "num_depths must be at least 1, got 0"),
        (lambda: SequentialMTP(1, BUILT_BLOCK), "block must be a Linen class"),
        (
            lambda: SequentialMTP(1, CausalBlock, norm_epsilon=0.0),
            "norm_epsilon must be above 0, got 0.0",
        ),
    ],
)
def test_bad_options_are_named(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("module", "shapes", "name"),
    [
        (MTPHeads(K, V), [(B, D)], "hidden_states"),
        (MTPHeads(K, V), [(B, S, D), (B, S, 1)], "attention_mask"),
        (ConfidenceGate(), [(B, D)], "hidden_states"),
        (ConfidenceGate(), [(B, S, D), (B, S - 1)], "attention_mask"),
        (adaptive(), [(B, S, D), (S,)], "attention_mask"),
        (SequentialMTP(1, CausalBlock), [(B, D), (B, D)], "hidden_states"),
        (SequentialMTP(1, CausalBlock), [(B, S, D), (B, S, 1)], "token_embeddings"),
    ],
)
def test_bad_shapes_are_named(
    module: nn.Module, shapes: list[tuple[int, ...]], name: str
) -> None:
    with untyped(), pytest.raises(ValueError, match=f"{name} must (be|have shape)"):
        made(module, *(jnp.ones(shape) for shape in shapes))


def test_bad_segments_and_blocks_are_named() -> None:
    h = normal(B, S, D)
    module, segments = SequentialMTP(1, CausalBlock), jnp.ones((B, S + 1), "int32")
    with untyped(), pytest.raises(ValueError, match="segment_ids must have shape"):
        made(module, h, h, segment_ids=segments)
    wider = SequentialMTP(1, functools.partial(nn.Dense, D + 1))
    with pytest.raises(ValueError, match="output of block must have shape"):
        made(wider, h, h)

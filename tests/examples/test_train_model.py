"""The transformer sees its own segment's past and nothing else."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.typing import VariableDict
from run_helpers import random_params

import ava_jax
from trainer.model.experts import Experts, Routing
from trainer.model.language_model import LanguageModel, hidden_and_head, loss_inputs
from trainer.model.layers import Batch, ModelConfig
from trainer.run.settings import LossFields

LOSS: LossFields = {"vocab_size": 20, "hidden_size": 16}


SMALL = ModelConfig(layers=2, width=16, heads=2)


def make_model(config: ModelConfig, loss: LossFields | None = None) -> LanguageModel:
    return LanguageModel(
        config=config,
        loss=ava_jax.create_unified_loss(LOSS | (loss or {})).config,
        columns=24,
        dtype=jnp.float32,
        fused=True,
    )


def shapes_of(model: LanguageModel, batch: Batch) -> optax.Params:
    """The shapes of the parameters."""
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


def make_batch(tokens: list[int], segments: list[int]) -> Batch:
    positions = [
        sum(s == segment for s in segments[:i]) for i, segment in enumerate(segments)
    ]
    row = jnp.array([tokens])
    return Batch(row, row, jnp.array([segments]), jnp.array([positions]))


def hidden(model: LanguageModel, params: optax.Params, batch: Batch) -> np.ndarray:
    apply = jax.jit(hidden_and_head, static_argnums=0)
    return np.asarray(apply(model, params, batch, None)[0][0])


@functools.partial(jax.jit, static_argnums=0)
def apply_experts(
    layer: Experts, params: optax.Params, x: jax.Array, bias: jax.Array | None
) -> tuple[jax.Array, Routing]:
    variables = cast(VariableDict, {"params": params})
    return cast(tuple[jax.Array, Routing], layer.apply(variables, x, bias))


CONFIGS = [
    ModelConfig(layers=2, width=16, heads=2),
    ModelConfig(layers=2, width=16, heads=2, experts=4, dense_layers=1),
    ModelConfig(layers=2, width=16, heads=2, remat=True),
    ModelConfig(layers=2, width=16, heads=2, remat=True, scan=True),
    ModelConfig(layers=2, width=16, heads=4, kv_heads=2, attention_block=4),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_nothing_sees_the_future_or_another_segment(config: ModelConfig) -> None:
    model = make_model(config)
    segments = [1, 1, 1, 2, 2, 2]
    base = make_batch([1, 2, 3, 4, 5, 6], segments)
    params = random_params(model, base)
    before = hidden(model, params, base)
    for changed in range(6):
        tokens = [1, 2, 3, 4, 5, 6]
        tokens[changed] = 17
        moved = np.abs(hidden(model, params, make_batch(tokens, segments)) - before)
        expected = [
            slot >= changed and segments[slot] == segments[changed] for slot in range(6)
        ]
        np.testing.assert_array_equal(moved.max(axis=-1) > 1e-6, expected)


def test_a_document_looks_the_same_wherever_it_is_packed() -> None:
    model = make_model(SMALL)
    alone = make_batch([7, 8, 9], [1, 1, 1])
    packed = make_batch([1, 2, 7, 8, 9, 3], [1, 1, 2, 2, 2, 3])
    params = random_params(model, alone)
    np.testing.assert_allclose(
        hidden(model, params, packed)[2:5], hidden(model, params, alone), atol=1e-5
    )


@pytest.mark.parametrize("block", [1, 4, 6, 64])
def test_attention_in_blocks_is_the_same(block: int) -> None:
    batch = make_batch([1, 2, 3, 4, 5, 6], [1, 1, 1, 1, 2, 2])
    whole = make_model(dataclasses.replace(SMALL, heads=4, kv_heads=2))
    parts = make_model(dataclasses.replace(whole.config, attention_block=block))
    params = random_params(whole, batch)
    np.testing.assert_allclose(
        hidden(parts, params, batch), hidden(whole, params, batch), atol=1e-5
    )


def test_heads_share_keys_and_values() -> None:
    batch = make_batch([1, 2, 3, 4, 5, 6], [1] * 6)
    shared = make_model(dataclasses.replace(SMALL, heads=4, kv_heads=2))
    params = random_params(shared, batch)
    repeated = jax.tree.map_with_path(
        lambda path, x: (
            jnp.repeat(x.reshape(16, 2, 4), 2, axis=1).reshape(16, 16)
            if x.shape == (16, 8)
            else x
        ),
        params,
    )
    own = make_model(dataclasses.replace(SMALL, heads=4))
    np.testing.assert_allclose(
        hidden(own, repeated, batch), hidden(shared, params, batch), atol=1e-5
    )


def test_a_loop_over_blocks_is_the_blocks() -> None:
    batch = make_batch([1, 2, 3, 4, 5, 6], [1] * 6)
    plain, loop = (
        make_model(dataclasses.replace(SMALL, scan=scan)) for scan in (False, True)
    )
    params = dict(cast(dict[str, optax.Params], random_params(plain, batch)))
    expected = hidden(plain, params, batch)
    blocks = [params.pop(f"blocks_{layer}") for layer in range(2)]
    params["blocks_0"] = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
    fresh = shapes_of(loop, batch)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(hidden(loop, params, batch), expected, atol=1e-5)


def test_positions_matter() -> None:
    model = make_model(SMALL)
    batch = make_batch([7, 8, 9], [1, 1, 1])
    params = random_params(model, batch)
    spread = batch._replace(positions=batch.positions * 5)
    difference = hidden(model, params, spread) - hidden(model, params, batch)
    assert np.abs(difference[1:]).max() > 1e-4


KERNELS = ("gate", "up", "down")


def dense_experts(
    params: Mapping[str, Mapping[str, jax.Array]],
    x: np.ndarray,
    bias: np.ndarray,
    k: int,
) -> np.ndarray:
    """Every expert by itself, in a loop over tokens."""
    gate, up, down = (np.asarray(params[n], np.float64) for n in KERNELS)
    logits = x @ np.asarray(params["router"]["kernel"], np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for token, (row, score) in enumerate(zip(x, scores, strict=True)):
        chosen = np.argsort(-(score + bias))[:k]
        for expert in chosen:
            z = row @ gate[expert]
            inner = z / (1 + np.exp(-z)) * (row @ up[expert])
            weight = score[expert] / score[chosen].sum()
            out[token] += weight * (inner @ down[expert])
    return out


@pytest.mark.parametrize("k", [1, 2, 4])
def test_experts_equal_a_loop_over_tokens(k: int) -> None:
    layer = Experts(4, k, 32, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 5, 16))
    bias = jnp.array([0.3, -0.3, 0.0, 0.1])
    params = jax.jit(layer.init)(jax.random.key(0), x, None)["params"]
    mixed, routing = apply_experts(layer, params, x, bias)
    tokens = np.asarray(x, np.float64).reshape(-1, 16)
    expected = dense_experts(params, tokens, np.asarray(bias), k)
    np.testing.assert_allclose(mixed.reshape(-1, 16), expected, atol=1e-5)
    assert routing.indices.shape == (10, k)
    unbiased, _ = apply_experts(layer, params, x, None)
    if k < 4:
        assert np.abs(unbiased - mixed).max() > 1e-3


def test_all_experts_run_where_diversity_asks_for_them() -> None:
    layer = Experts(4, 4, 32, jnp.float32, run_all=True)
    x = jax.random.normal(jax.random.key(1), (1, 6, 16))
    params = jax.jit(layer.init)(jax.random.key(0), x, None)["params"]
    mixed, routing = apply_experts(layer, params, x, None)
    weights = jax.nn.softmax(routing.gate_logits)
    summed = jnp.einsum("ne,end->nd", weights, routing.outputs)
    np.testing.assert_allclose(mixed[0], summed, atol=1e-5)


def names_of_inputs(model: LanguageModel, batch: Batch) -> set[str]:
    """What the model gives to its loss."""
    give = functools.partial(loss_inputs, model)
    return set(jax.eval_shape(give, shapes_of(model, batch), batch, None))


@pytest.mark.parametrize(
    ("loss", "key"),
    [
        ({"use_mtp": True}, "mtp_params"),
        ({"use_mtp": True, "mtp_type": "sequential"}, "mtp_hidden_states"),
        ({"primary_loss_type": "adaptive_mtp"}, "confidence_scores"),
        ({"use_mtp": True, "mtp_type": "adaptive"}, "additional_logits"),
    ],
)
def test_the_loss_decides_which_heads_there_are(loss: LossFields, key: str) -> None:
    model = make_model(SMALL, loss)
    batch = make_batch([1, 2, 3, 4, 5, 6], [1] * 6)
    assert key in names_of_inputs(model, batch)
    own = names_of_inputs(make_model(SMALL), batch)
    given = {"targets", "attention_mask", "segment_ids"}
    assert own == given | {"hidden_states", "lm_head"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"width": 18, "heads": 4}, "multiple of 2"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"heads": 4, "kv_heads": 3}, "multiple of model.kv_heads: got 4 and 3"),
        ({"attention_block": -1}, "attention_block must be at least 0"),
        ({"experts": 2, "experts_per_token": 3}, "between 1 and model.experts"),
        ({"experts": 4, "layers": 2, "dense_layers": 2}, "dense_layers"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **sizes)

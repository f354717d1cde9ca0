"""The heads and the gate: reference numbers, oracles, masks, dropout."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.golden_cases import GoldenCase, cases_of, compare, on_device
from support.head_checks import (
    ACTIVATIONS,
    KEY,
    B,
    D,
    K,
    Layer,
    Params,
    S,
    V,
    apply,
    fresh,
    in_numpy,
    init,
    made,
    normal,
    oracle_dense,
    oracle_gelu,
    oracle_layer_norm,
)
from support.loss_checks import check_gradient

from ava_jax.heads import ConfidenceGate, MTPHeads

POOLINGS = ({}, {"use_attention_pooling": True}, {"per_token": True})
VARIANTS = [(kind, shared) for kind in ("linear", "mlp") for shared in (False, True)]


# From PyTorch's names to ours ----------------------------------------------------


def torch_layer(inputs: Layer, name: str) -> Layer:
    """One layer: a matrix is transposed, and a norm's weight is called `scale`."""
    weight, bias = inputs[f"torch.{name}.weight"], inputs[f"torch.{name}.bias"]
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    return {"kernel": weight.T, "bias": bias}


def torch_stack(inputs: Layer, name: str, count: int) -> Layer:
    layers = [torch_layer(inputs, name.format(j)) for j in range(count)]
    return {key: np.stack([layer[key] for layer in layers]) for key in layers[0]}


def gate_params(case: GoldenCase) -> Params:
    inputs, params = case.arrays[0]["in"], {}
    for layer in range(len(case.config["gate_hidden_dims"]) + 1):
        params[f"norm_{layer}"] = torch_layer(inputs, f"gate_network.{4 * layer}")
        params[f"dense_{layer}"] = torch_layer(inputs, f"gate_network.{4 * layer + 1}")
    if case.config["use_attention_pooling"]:
        params["attention_pool"] = torch_layer(inputs, "attention_pool.0")
    return params


def heads_params(case: GoldenCase) -> Params:
    inputs, config, params = case.arrays[0]["in"], case.config, {}
    if config["use_layer_norm"]:
        params["norm"] = torch_layer(inputs, "layer_norm")
    match config["head_type"], config["share_projections"]:
        case "linear", False:
            params["heads"] = torch_stack(inputs, "heads.{}", config["num_heads"])
        case "linear", True:
            params["shared_heads"] = torch_layer(inputs, "shared_head")
        case "mlp", False:
            params["hidden"] = torch_stack(inputs, "heads.{}.0", config["num_heads"])
            params["output"] = torch_stack(inputs, "heads.{}.3", config["num_heads"])
        case _:
            params["shared_hidden"] = torch_layer(inputs, "shared_head.0")
            params["shared_output"] = torch_layer(inputs, "shared_head.3")
    return params


# Reference numbers ---------------------------------------------------------------


def golden_logits(case: GoldenCase, x: Params) -> dict[str, jax.Array]:
    module = MTPHeads(vocab_size=13, **case.config)
    params = on_device(heads_params(case))
    return {"all_logits": apply(module, {"params": params}, x["hidden_states"])}


def golden_confidence(case: GoldenCase, x: Params) -> dict[str, jax.Array]:
    module = ConfidenceGate(**case.config)
    variables = {"params": on_device(gate_params(case))}
    scores = apply(module, variables, x["hidden_states"], x.get("attention_mask"))
    return {"confidence": scores, "avg_confidence": np.mean(scores)}


GOLDEN = {"confidence_gate": golden_confidence, "mtp_heads": golden_logits}


@pytest.mark.parametrize(("x64", "tolerance"), [(False, 2e-5), (True, 1e-8)])
@pytest.mark.parametrize("case", cases_of(*GOLDEN), ids=lambda case: case.name)
def test_reference_numbers(case: GoldenCase, x64: bool, tolerance: float) -> None:
    with jax.enable_x64(x64):
        got = GOLDEN[case.kind](case, on_device(case.arrays[0]["in"]))
        compare(case, 0, "out", got, tolerance)


def test_wrong_formulas_are_far_from_the_reference_numbers() -> None:
    shared, masked = cases_of("mtp_heads")[2], cases_of("confidence_gate")[1]
    logits = shared.arrays[0]["out"]["all_logits"]
    interleaved = np.moveaxis(np.moveaxis(logits, 0, 2).reshape(2, 6, 13, 3), 3, 0)
    assert np.abs(interleaved - logits).max() > 1
    unmasked = {"hidden_states": on_device(masked.arrays[0]["in"])["hidden_states"]}
    with pytest.raises(AssertionError, match="confidence"):
        compare(masked, 0, "out", golden_confidence(masked, unmasked), 1e-3)


# MTPHeads ------------------------------------------------------------------------


def oracle_heads(h: NDArray, p: Params, module: MTPHeads) -> NDArray:
    shared, vocab = module.share_projections, module.vocab_size

    def layer(name: str, head: int) -> Layer:
        if not shared:
            return {key: value[head] for key, value in p[name].items()}
        layer, columns = p[f"shared_{name}"], slice(head * vocab, (head + 1) * vocab)
        if name == "hidden":
            return layer
        return {key: value[..., columns] for key, value in layer.items()}

    x = oracle_layer_norm(h, p["norm"]) if module.use_layer_norm else h
    outputs = []
    for head in range(module.num_heads):
        if module.head_type == "mlp":
            inner = oracle_gelu(oracle_dense(x, layer("hidden", head)))
            outputs.append(oracle_dense(inner, layer("output", head)))
        else:
            outputs.append(oracle_dense(x, layer("heads", head)))
    return np.stack(outputs)


def shapes(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


def test_default_parameters_are_the_mtp_params_of_the_loss() -> None:
    params = fresh(MTPHeads(K, V), normal(B, S, D))
    assert shapes(params) == {
        "norm": {"scale": (D,), "bias": (D,)},
        "heads": {"kernel": (K, D, V), "bias": (K, V)},
    }
    assert np.std(params["heads"]["kernel"]) == pytest.approx(D**-0.5, rel=0.3)


@pytest.mark.parametrize(
    ("kind", "shared", "expected"),
    [
        ("linear", True, {"shared_heads": (D, K * V)}),
        ("mlp", False, {"hidden": (K, D, 4 * D), "output": (K, 4 * D, V)}),
        ("mlp", True, {"shared_hidden": (D, 4 * D), "shared_output": (4 * D, K * V)}),
    ],
)
def test_parameters_of_the_other_heads(kind: str, shared: bool, expected: dict) -> None:
    module = MTPHeads(K, V, kind, shared, use_layer_norm=False)
    params = made(module, normal(B, S, D))
    assert {name: layer["kernel"].shape for name, layer in params.items()} == expected


@settings(max_examples=15, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS),
    heads=st.integers(1, 4),
    vocab=st.integers(1, 9),
    length=st.integers(1, 5),
    use_layer_norm=st.booleans(),
    seed=st.integers(0, 99),
)
def test_heads_equal_the_oracle(
    variant: tuple[str, bool],
    heads: int,
    vocab: int,
    length: int,
    use_layer_norm: bool,
    seed: int,
) -> None:
    module = MTPHeads(
        heads, vocab, *variant, intermediate_size=5, use_layer_norm=use_layer_norm
    )
    with jax.enable_x64(True):
        h = normal(B, length, D, seed=seed, dtype="float64")
        variables = init(module, h, seed=seed)
        got = apply(module, variables, h)
    want = oracle_heads(np.asarray(h), in_numpy(variables["params"]), module)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_heads_read_masked_positions_as_zeros() -> None:
    module, mask = MTPHeads(K, V), np.arange(S) < np.array([[S], [2]])
    h = normal(B, S, D)
    variables = init(module, h)
    poisoned = np.where(mask[..., None], h, np.float32(np.nan))

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def run(variables: Any, h: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(apply(module, variables, h, jax.device_put(mask))))

    got = run(variables, poisoned)
    chex.assert_trees_all_equal(got, run(variables, h))
    chex.assert_tree_all_finite(got)
    np.testing.assert_array_equal(np.asarray(got[1][1])[1, 2:], 0)
    assert np.isnan(apply(module, variables, poisoned)).any()


@pytest.mark.parametrize("shared", [False, True])
def test_mlp_dropout_is_active_only_on_request(shared: bool) -> None:
    module = MTPHeads(K, V, "mlp", shared, dropout_rate=0.5)
    plain = MTPHeads(K, V, "mlp", shared)
    h = normal(1, 1, D)
    variables = init(module, h)
    exact = np.asarray(apply(plain, variables, h))
    chex.assert_trees_all_equal(apply(module, variables, h), exact)
    with pytest.raises(Exception, match="dropout"):
        apply(module, variables, h, deterministic=False)

    def draw(key: jax.Array) -> Any:
        return apply(module, variables, h, deterministic=False, rngs={"dropout": key})

    draws = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000)))
    assert np.std(draws, axis=0).min() > 0.1
    error = np.abs(draws.mean(0) - exact) / np.std(draws, axis=0)
    assert error.max() < 5 / 4000**0.5


# ConfidenceGate ------------------------------------------------------------------


def oracle_pool(h: NDArray, w: NDArray, p: Params) -> NDArray:
    pooled = np.zeros((h.shape[0], h.shape[2]))
    for b in range(h.shape[0]):
        unmasked = [t for t in range(h.shape[1]) if w[b, t] != 0]
        shares = np.array([w[b, t] for t in unmasked])
        if "attention_pool" in p:
            scores = [oracle_dense(h[b, t], p["attention_pool"])[0] for t in unmasked]
            shares = shares * np.exp(scores)
        for t, share in zip(unmasked, shares, strict=True):
            pooled[b] += share / shares.sum() * h[b, t]
    return pooled


def oracle_gate(x: NDArray, p: Params, activation: str) -> NDArray:
    """The gate on pooled rows or on tokens."""
    depth = sum(name.startswith("dense_") for name in p) - 1
    for i in range(depth):
        x = oracle_dense(oracle_layer_norm(x, p[f"norm_{i}"]), p[f"dense_{i}"])
        x = ACTIVATIONS[activation](x)
    x = oracle_dense(oracle_layer_norm(x, p[f"norm_{depth}"]), p[f"dense_{depth}"])
    return 1 / (1 + np.exp(-x))


@st.composite
def masks(draw: st.DrawFn) -> NDArray:
    """[B, S] float weights, zeros among them, each row with an unmasked token."""
    length = draw(st.integers(1, 5))
    weight = st.sampled_from([0.0, 0.25, 1.0, 2.0])
    rows = st.lists(weight, min_size=length, max_size=length).filter(any)
    return np.array(draw(st.lists(rows, min_size=1, max_size=3)))


@settings(max_examples=15, deadline=None)
@given(
    mask=masks(),
    pooling=st.sampled_from(POOLINGS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    dims=st.sampled_from([(), (3,), (5, 2)]),
    seed=st.integers(0, 99),
)
def test_gate_equals_the_oracle(
    mask: NDArray, pooling: dict, activation: str, dims: tuple[int, ...], seed: int
) -> None:
    module = ConfidenceGate(dims, activation, **pooling)
    with jax.enable_x64(True):
        h = normal(*mask.shape, D, seed=seed, dtype="float64")
        variables = init(module, h, seed=seed)
        got = np.asarray(apply(module, variables, h, jax.device_put(mask)))
    params, x = in_numpy(variables["params"]), np.asarray(h)
    if not module.per_token:
        x = oracle_pool(x, mask, params)
    want = oracle_gate(x, params, activation)
    unmasked = mask != 0 if module.per_token else ...
    np.testing.assert_allclose(got[unmasked], want[unmasked], rtol=1e-9)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_masked_positions_do_not_matter_to_the_gate(
    pooling: dict, poison: float
) -> None:
    module = ConfidenceGate((5, 3), **pooling)
    mask = np.arange(S) < np.array([[S], [2], [0]])
    h = normal(3, S, D)
    variables = init(module, h)

    def loss(variables: Any, h: jax.Array) -> jax.Array:
        return jnp.sum(jnp.log(apply(module, variables, h, jax.device_put(mask))))

    grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    got = grad(variables, np.where(mask[..., None], h, np.float32(poison)))
    chex.assert_trees_all_equal(got, grad(variables, h))
    chex.assert_tree_all_finite(got)
    of_rows = np.asarray(got[1][1])
    np.testing.assert_array_equal(of_rows[~mask], 0)
    assert np.all(np.abs(of_rows[mask]).sum(-1) > 0)


def test_attention_pooling_survives_huge_scores() -> None:
    module = ConfidenceGate((3,), use_attention_pooling=True)
    h = jnp.array([[[1e4, 1.0], [-1e4, 1.0], [0.0, 1.0]]])
    variables = init(module, h)
    run = jax.jit(jax.value_and_grad(lambda v: apply(module, v, h).sum()))
    chex.assert_tree_all_finite(run(variables))


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32", "bfloat16"])
def test_gate_takes_masks_of_any_dtype(dtype: str) -> None:
    module, mask = ConfidenceGate((3,)), np.arange(S) < np.array([[S], [2]])
    h = normal(B, S, D)
    variables = init(module, h)
    got = apply(module, variables, h, mask.astype(dtype))
    chex.assert_trees_all_equal(got, apply(module, variables, h, mask))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_gate_gradient(pooling: dict) -> None:
    module = ConfidenceGate((3,), **pooling)
    with jax.enable_x64(True):
        h = normal(1, 3, D, dtype="float64")
        leaves, structure = jax.tree.flatten(init(module, h))

    def loss(h: jax.Array, *leaves: jax.Array) -> jax.Array:
        variables = jax.tree.unflatten(structure, leaves)
        scores = module.apply(variables, h, jnp.array([[1, 0, 1]]))
        assert isinstance(scores, jax.Array)
        return jnp.sum(scores * jnp.arange(1.0, 1 + scores.size).reshape(scores.shape))

    check_gradient(loss, np.asarray(h), *map(np.asarray, leaves))


@pytest.mark.parametrize("start", [0.2, 0.7])
def test_new_gate_has_about_the_initial_confidence(start: float) -> None:
    module, h = ConfidenceGate(initial_confidence=start), normal(8, S, 32)
    scores = apply(module, {"params": fresh(module, h)}, h)
    np.testing.assert_allclose(scores, start, atol=0.1)


def test_gate_dropout_is_active_only_on_request() -> None:
    module, h = ConfidenceGate((32,), dropout_rate=0.5), normal(B, S, D)
    variables = jax.tree.map(lambda x: 0.3 * np.asarray(x), init(module, h))
    exact = np.asarray(apply(module, variables, h))
    chex.assert_trees_all_equal(apply(ConfidenceGate((32,)), variables, h), exact)
    noisy = apply(module, variables, h, deterministic=False, rngs={"dropout": KEY})
    assert np.all(np.abs(noisy / exact - 1) > 1e-3)

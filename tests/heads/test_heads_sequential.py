"""The sequential heads: an oracle, what each depth depends on, packed rows."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.head_checks import (
    B,
    CausalBlock,
    D,
    DenseBlock,
    K,
    S,
    apply,
    fresh,
    in_numpy,
    init,
    normal,
    oracle_dense,
    oracle_rms_norm,
)

from ava_jax.heads import SequentialMTP


def oracle_sequential(
    h: NDArray, e: NDArray, segments: NDArray, p: dict[str, Any], depths: int
) -> NDArray:
    """Depth by depth and token by token; the block is a dense layer."""
    rows, length, width = h.shape
    outputs, before = [], h
    for j in range(1, depths + 1):
        after = np.zeros_like(h)
        for b in range(rows):
            for t in range(length):
                ahead = np.zeros(width)
                same = t + j < length and segments[b, t + j] == segments[b, t] != 0
                if same:
                    ahead = e[b, t + j]
                here = before[b, t] * (j > 1 or segments[b, t] != 0)
                pair = np.concatenate(
                    [
                        oracle_rms_norm(here, p[f"norm_hidden_{j}"]),
                        oracle_rms_norm(ahead, p[f"norm_embedding_{j}"]),
                    ]
                )
                joined = pair @ p[f"project_{j}"]["kernel"]
                after[b, t] = oracle_dense(joined, p[f"block_{j}"]["Dense_0"])
        outputs.append(after)
        before = after
    return np.stack(outputs)


@settings(max_examples=15, deadline=None)
@given(
    segments=st.lists(
        st.lists(st.integers(0, 2), min_size=5, max_size=5).map(sorted),
        min_size=1,
        max_size=2,
    ),
    depths=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_sequential_equals_the_oracle(
    segments: list[list[int]], depths: int, seed: int
) -> None:
    ids, module = np.array(segments), SequentialMTP(depths, DenseBlock)
    with jax.enable_x64(True):
        h, e = (normal(*ids.shape, D, seed=seed + i, dtype="float64") for i in (0, 1))
        variables = init(module, h, e, seed=seed)
        packed = apply(module, variables, h, e, segment_ids=jax.device_put(ids))
        plain = apply(module, variables, h, e)
    arrays = np.asarray(h), np.asarray(e)
    params = in_numpy(variables["params"])
    want = oracle_sequential(*arrays, ids, params, depths)
    np.testing.assert_allclose(packed, want, rtol=1e-9, atol=1e-9)
    want = oracle_sequential(*arrays, np.ones_like(ids), params, depths)
    np.testing.assert_allclose(plain, want, rtol=1e-9, atol=1e-9)


def test_depth_j_depends_on_the_tokens_up_to_t_plus_j() -> None:
    module, e = SequentialMTP(K, CausalBlock), normal(1, S, D)
    variables = init(module, e, e)

    def predict(e: jax.Array) -> Any:
        return apply(module, variables, jnp.cumsum(jnp.sin(e), axis=1), e)

    jacobian = np.asarray(jax.jacrev(predict)(e))
    reach = np.abs(jacobian).sum(axis=(1, 3, 4, 6)) > 0
    for j in range(1, K + 1):
        np.testing.assert_array_equal(reach[j - 1], np.tri(S, S, j, dtype=bool))


def test_depths_have_parameters_of_their_own() -> None:
    h = normal(B, S, D)
    params = fresh(SequentialMTP(2, CausalBlock), h, h)
    assert {name: sorted(layer) for name, layer in params.items()} == {
        "norm_hidden_1": ["scale"],
        "norm_embedding_1": ["scale"],
        "project_1": ["kernel"],
        "block_1": ["Dense_0"],
        "norm_hidden_2": ["scale"],
        "norm_embedding_2": ["scale"],
        "project_2": ["kernel"],
        "block_2": ["Dense_0"],
    }
    assert params["project_1"]["kernel"].shape == (2 * D, D)
    kernels = [params[f"block_{j}"]["Dense_0"]["kernel"] for j in (1, 2)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1


def test_final_norm_acts_on_the_output_only() -> None:
    h, e = normal(B, S, D), normal(B, S, D, seed=1)
    plain = SequentialMTP(2, CausalBlock)
    normed = SequentialMTP(2, CausalBlock, use_final_norm=True)
    variables = init(normed, h, e)
    params = variables["params"]
    kept = {n: p for n, p in params.items() if not n.startswith("norm_final")}
    assert len(kept) == len(params) - 2
    raw = np.asarray(apply(plain, {"params": kept}, h, e), np.float64)
    want = [
        oracle_rms_norm(raw[j - 1], in_numpy(params[f"norm_final_{j}"])) for j in (1, 2)
    ]
    np.testing.assert_allclose(apply(normed, variables, h, e), want, rtol=1e-4)


def test_block_gets_its_own_arguments() -> None:
    module, h = SequentialMTP(1, CausalBlock), normal(B, S, D)
    variables = init(module, h, h)
    one, two, three = (apply(module, variables, h, h, g) for g in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(two - one, three - two, rtol=1e-3, atol=1e-4)
    shifted = apply(module, variables, h, h, 1.0, shift=10.0)
    np.testing.assert_allclose(shifted, two + 10, rtol=1e-5)


def test_padding_of_packed_rows_may_hold_nan() -> None:
    module, ids = SequentialMTP(2, CausalBlock), jnp.array([[1, 1, 1, 2, 2, 0]] * B)
    h, e = normal(B, S, D), normal(B, S, D, seed=1)
    variables = init(module, h, e)

    def loss(variables: Any, h: jax.Array, e: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(apply(module, variables, h, e, segment_ids=ids)))

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2))
    poison = jnp.where((ids == 0)[..., None], jnp.nan, 0.0)
    got = grad(variables, h + poison, e + poison)
    chex.assert_trees_all_equal(got, grad(variables, h, e))
    chex.assert_tree_all_finite(got)
    for gradient in got[1][1:]:
        np.testing.assert_array_equal(gradient[:, -1], 0)

"""On a mesh, log-probabilities and their gradients are those of one device."""

import contextlib
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.trees import assert_trees_close

import ava_jax
from benchmarks.hlo import collectives

B, S, D, V = 4, 8, 16, 13
COLUMNS = 16
NAMES = ("log_probs", "entropy", "log_z")
SPECS = {
    "hidden_states": P("data", "sequence"),
    "logits": P("data", "sequence", "tensor"),
    "lm_head": P(None, "tensor"),
    "lm_head_bias": P("tensor"),
    "targets": P("data", "sequence"),
    "attention_mask": P("data", "sequence"),
}
ALL = {"data": 2, "sequence": 2, "tensor": 2}
SIZES = {
    "batch": {"data": 4, "sequence": 1, "tensor": 1},
    "sequence": {"data": 1, "sequence": 4, "tensor": 1},
    "vocabulary": {"data": 1, "sequence": 1, "tensor": 8},
    "all": ALL,
}


def arrays(path: str, columns: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Floats and integers; devices have many unmasked tokens, few or none."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    mask = np.arange(S) < np.array([S, 0, 3, 1])[:, None]
    targets = rng.integers(0, V, (B, S), np.int32)
    targets[0, 2] = V
    ints = {"targets": targets, "attention_mask": mask}
    nan, temperature = np.float32(np.nan), np.float32(1.3)
    if path == "logits":
        logits = np.where(mask[..., None], 2 * normal(B, S, columns), nan)
        floats = {"logits": logits, "temperature": temperature}
        return jax.device_put((floats, ints))
    floats = {
        "hidden_states": np.where(mask[..., None], normal(B, S, D), nan),
        "lm_head": normal(D, columns),
        "lm_head_bias": normal(columns),
        "temperature": temperature,
    }
    if path == "plain":
        del floats["lm_head_bias"], floats["temperature"]
    return jax.device_put((floats, ints))


def make_step(path: str, **layout: Any) -> Any:
    """The values, and the gradients of a weighted sum of them."""
    options: dict[str, Any] = {"vocab_size": V, **layout}
    if path != "logits":
        options |= {"chunk_size": 3, "block_size": 2}

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def step(floats, ints):
        out = ava_jax.token_log_probs(**floats, **ints, **options)
        weights = jnp.cos(jnp.arange(B * S, dtype=jnp.float32)).reshape(B, S)
        values = [getattr(out, name) for name in NAMES]
        parts = (jnp.sum((weights + i) * value) for i, value in enumerate(values))
        return sum(parts, start=jnp.zeros(())), out

    return step


@functools.cache
def alone(path: str, columns: int) -> Any:
    """What one device computes."""
    return make_step(path)(*arrays(path, columns))


def placed(mesh: Any, tree: dict[str, jax.Array], columns: int) -> dict[str, Any]:
    """The arrays on the mesh; a vocabulary that it does not divide is replicated."""

    def place(name: str, x: jax.Array) -> jax.Array:
        spec = SPECS.get(name, P())
        if columns % mesh.shape["tensor"]:
            spec = P(*(None if axis == "tensor" else axis for axis in spec))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return {name: place(name, x) for name, x in tree.items()}


def mesh_of(sizes: dict[str, int], types: AxisType) -> Any:
    """A mesh of the first devices."""
    count = functools.reduce(int.__mul__, sizes.values())
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(types,) * len(sizes),
        devices=jax.devices()[:count],
    )


def layout_of(mesh: Any) -> dict[str, Any]:
    """The arguments that tell of the mesh."""
    return {
        "mesh": mesh,
        "batch_axes": "data",
        "sequence_axis": "sequence",
        "vocab_axis": "tensor",
    }


def check(
    path: str,
    sizes: dict[str, int],
    types: AxisType,
    columns: int = COLUMNS,
    *,
    gets_mesh: bool = True,
) -> None:
    """Compares a mesh with one device, and looks where the results are."""
    mesh = mesh_of(sizes, types)
    step = make_step(path, **(layout_of(mesh) if gets_mesh else {}))
    context = jax.set_mesh(mesh) if types is AxisType.Explicit else None
    with context or contextlib.nullcontext():
        floats, ints = (placed(mesh, x, columns) for x in arrays(path, columns))
        got = step(floats, ints)
    want = alone(path, columns)
    assert int(want[0][1].num_invalid_targets) == 1
    assert_trees_close(jax.device_get(got), jax.device_get(want), 5e-6)
    if types is not AxisType.Explicit:
        return
    for name, grad in got[1].items():
        assert grad.sharding.is_equivalent_to(floats[name].sharding, grad.ndim), name
    for name in NAMES:
        value = getattr(got[0][1], name)
        want_sharding = NamedSharding(mesh, P("data", "sequence"))
        assert value.sharding.is_equivalent_to(want_sharding, 2), (name, value.sharding)


SLOW = pytest.mark.slow
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


QUICK = (
    ("fused", "all", EXPLICIT),
    ("plain", "all", AUTO),
    ("logits", "all", EXPLICIT),
    ("fused", "vocabulary", AUTO),
)


@pytest.mark.parametrize(
    ("path", "name", "types"),
    [
        pytest.param(*case, marks=[] if case in QUICK else SLOW)
        for case in itertools.product(
            ("fused", "plain", "logits"), SIZES, (AUTO, EXPLICIT)
        )
    ],
)
def test_a_mesh_changes_no_number(path: str, name: str, types: AxisType) -> None:
    check(path, SIZES[name], types)


@pytest.mark.parametrize(
    ("path", "columns", "size"),
    [
        ("fused", V, 8),
        pytest.param("logits", V, 8, marks=SLOW),
        pytest.param("plain", V, 4, marks=SLOW),
        pytest.param("fused", V + 1, 4, marks=SLOW),
    ],
)
def test_a_vocabulary_that_the_devices_cannot_share_evenly(
    path: str, columns: int, size: int
) -> None:
    check(path, {"data": 1, "sequence": 1, "tensor": size}, AUTO, columns)


@pytest.mark.parametrize(
    ("path", "types"),
    [
        ("fused", AUTO),
        ("fused", EXPLICIT),
        pytest.param("plain", AUTO, marks=SLOW),
        pytest.param("logits", AUTO, marks=SLOW),
        pytest.param("logits", EXPLICIT, marks=SLOW),
    ],
)
def test_without_mesh_xla_decides(path: str, types: AxisType) -> None:
    check(path, ALL, types, gets_mesh=False)


@pytest.mark.parametrize(
    "types",
    [(AUTO,) * 3, pytest.param((EXPLICIT, AUTO, AUTO), marks=SLOW)],
    ids=["auto", "mixed"],
)
def test_without_jit(types: tuple[AxisType, ...]) -> None:
    """Not only in compiled programs, and with axes of both types."""
    mesh = jax.make_mesh((2, 2, 2), tuple(ALL), axis_types=types)
    floats, ints = arrays("plain", COLUMNS)

    def loss(floats):
        out = ava_jax.token_log_probs(**floats, **ints, vocab_size=V, **layout_of(mesh))
        weights = jnp.cos(jnp.arange(B * S, dtype=jnp.float32)).reshape(B, S)
        values = [getattr(out, name) for name in NAMES]
        parts = (jnp.sum((weights + i) * value) for i, value in enumerate(values))
        return sum(parts, start=jnp.zeros(()))

    with jax.set_mesh(mesh):
        got = jax.value_and_grad(loss)(floats)
    (value, _), grads = alone("plain", COLUMNS)
    assert_trees_close(jax.device_get(got), jax.device_get((value, grads)), 5e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_hidden_states_and_logits_stay_where_they_are(gradient: bool) -> None:
    """Devices exchange numbers per token, and sums of the gradients."""
    mesh = mesh_of(ALL, AUTO)
    floats, ints = (placed(mesh, x, COLUMNS) for x in arrays("plain", COLUMNS))

    def loss(floats, ints):
        out = ava_jax.token_log_probs(
            **floats, **ints, vocab_size=V, chunk_size=2, **layout_of(mesh)
        )
        return jnp.sum(out.log_probs**2 + out.entropy)

    function = jax.value_and_grad(loss) if gradient else loss
    text = jax.jit(function).lower(floats, ints).compile().as_text()
    found = collectives(str(text))
    gathered = [c.shape for c in found if c.kind == "all-gather"]
    assert found
    # Of a device's 8 tokens, the row maxima of both shards; nothing with D numbers.
    assert all(D not in shape and V not in shape for shape in gathered), gathered
    local = B * S // 4
    most = max(local * D, D * COLUMNS // 2) if gradient else 4 * 8 * local
    assert max(c.size for c in found) <= 4 * most, [(c.kind, c.shape) for c in found]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch_axes": "rows"}, "'rows' is not an axis of the mesh"),
        ({"vocab_axis": "columns"}, "'columns' is not an axis of the mesh"),
        ({"batch_axes": "data", "vocab_axis": "data"}, "'data' is given twice"),
        ({"batch_axes": ("data", "sequence", "tensor")}, "4 rows, which the 8 devices"),
    ],
)
def test_layouts_that_make_no_sense(axes: dict[str, Any], message: str) -> None:
    floats, ints = arrays("plain", COLUMNS)
    with pytest.raises(ValueError, match=message):
        ava_jax.token_log_probs(**floats, **ints, mesh=mesh_of(ALL, AUTO), **axes)

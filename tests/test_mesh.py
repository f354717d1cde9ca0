"""On a mesh the loss is the single device's: values, state and all gradients."""

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.scenes import EVERYTHING, E, K
from support.trees import assert_trees_close

import ava_jax

B, S, D, V = 8, 8, 8, 13
COLUMNS = 16  # which eight devices share; 13 of them are classes
ROWS = ("data", "fsdp")

PARALLEL: dict[str, Any] = {**EVERYTHING, "vocab_size": V, "hidden_size": D}
CONFIGS: dict[str, dict[str, Any]] = {
    "parallel": PARALLEL,
    "sequential": {
        **PARALLEL,
        "mtp_type": "sequential",
        "moe_balancing_type": "bias",
        "logit_soft_cap": 5.0,
        "chunk_size": 3,
    },
    "adaptive": {
        "vocab_size": V,
        "primary_loss_type": "adaptive_mtp",
        "num_future_tokens": K,
    },
}

# The axes that each array's dimensions lie along, of those that the mesh has.
PLACES: dict[str, tuple[Any, ...]] = {
    "targets": (ROWS, "sequence"),
    "attention_mask": (ROWS, "sequence"),
    "segment_ids": (ROWS, "sequence"),
    "expert_indices": (ROWS, "sequence"),
    "hidden_states": (ROWS, "sequence"),
    "mtp_hidden_states": (None, ROWS, "sequence"),
    "gate_logits": (ROWS, "sequence"),
    "expert_outputs": (None, ROWS, "sequence"),
    "additional_logits": (None, ROWS, "sequence", "tensor"),
    "confidence_scores": (ROWS,),
    "lm_head": ("fsdp", "tensor"),
    "lm_head_bias": ("tensor",),
    "kernel": (None, "fsdp", "tensor"),
}


@functools.cache
def floats(columns):
    """All differentiable arguments; `temperature` is the state's."""
    rng = np.random.default_rng(1)

    def normal(*shape):
        return rng.standard_normal(shape, np.float32)

    def over_columns(*shape):
        return normal(*shape, COLUMNS)[..., :columns]

    return {
        "temperature": np.float32(1.3),
        "hidden_states": normal(B, S, D),
        "mtp_hidden_states": normal(K, B, S, D),
        "lm_head": over_columns(D),
        "lm_head_bias": over_columns(),
        "gate_logits": normal(B, S, E),
        "expert_outputs": normal(E, B, S, 4),
        "additional_logits": over_columns(K, B, S),
        "confidence_scores": rng.random(B, np.float32),
        "mtp_params": {
            "norm": {"scale": 1 + normal(D) / 10, "bias": normal(D)},
            "heads": {"kernel": over_columns(K, D), "bias": over_columns(K)},
        },
    }


@functools.cache
def integers():
    """Repeats, packed rows that break anywhere, shards with few tokens or none."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 0, S, S, 3, S, S - 1, 2])
    segments = 1 + (np.arange(S) >= np.arange(B)[:, None])
    return {
        "targets": rng.integers(0, 4, (B, S), np.int32),
        "attention_mask": np.arange(S) < lengths[:, None],
        "segment_ids": segments.astype(np.int32),
        "expert_indices": rng.integers(0, E, (B, S, 2), np.int32),
    }


def spec_of(name, mesh):
    """The array's place on a mesh that lacks some of the axes."""

    def present(axis):
        if isinstance(axis, tuple):
            return tuple(a for a in axis if a in mesh.axis_names) or None
        return axis if axis in mesh.axis_names else None

    return P(*map(present, PLACES.get(name, ())))


def placed(mesh, tree, columns):
    """The arrays on the mesh; a vocabulary that it does not divide is replicated."""

    def place(path, x):
        spec = spec_of(path[-1].key, mesh)
        if "tensor" in spec and columns % mesh.shape["tensor"]:
            spec = P(*(None if axis == "tensor" else axis for axis in spec))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def make_step(config, path, **layout):
    """Loss, aux, state and gradients, the temperature's among them."""
    loss_fn = ava_jax.create_unified_loss(config, **layout)

    def step(arrays, ints):
        def loss(arrays):
            given = dict(arrays)
            state = loss_fn.init()
            temperature = given.pop("temperature")
            if state.temperature is not None:
                state = ava_jax.LossState(**vars(state) | {"temperature": temperature})
            if path == "logits":
                product = given["hidden_states"] @ given["lm_head"]
                given["logits"] = product + given["lm_head_bias"]
            inputs: Any = {**given, **ints}
            total, aux, after = loss_fn(state, **loss_fn.select(inputs))
            return total, (aux, after)

        return jax.value_and_grad(loss, has_aux=True)(arrays)

    return jax.jit(step)


@functools.cache
def alone(name):
    """What one device computes from hidden states."""
    return make_step(CONFIGS[name], "fused")(floats(COLUMNS), integers())


def first_columns(tree, columns):
    """The arrays without further columns, which are no classes: those are all 0."""

    def cut(x):
        if x.shape[-1:] != (COLUMNS,):
            return x
        assert not np.any(x[..., V:])
        return x[..., :columns]

    return jax.tree.map(cut, jax.device_get(tree))


def check(name, path, sizes, types=AxisType.Auto, columns=COLUMNS, *, gets_mesh=True):
    """Compares a mesh with one device.

    Args:
      name: of the config.
      path: `"logits"` or `"fused"`.
      sizes: the mesh's axes and their sizes.
      types: of all the axes.
      columns: of lm_head and the logits.
      gets_mesh: whether the loss knows of the mesh.
    """
    count = len(sizes)
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(types,) * count
    )
    layout: dict[str, Any] = {}
    if gets_mesh:
        layout = {"mesh": mesh, "vocab_axis": "tensor"}
        layout["batch_axes"] = tuple(a for a in ROWS if a in sizes)
        layout["sequence_axis"] = "sequence" if "sequence" in sizes else None
    step = make_step(CONFIGS[name], path, **layout)
    context = jax.set_mesh(mesh) if types is AxisType.Explicit else None
    with context or contextlib.nullcontext():
        arrays = placed(mesh, floats(columns), columns)
        got = step(arrays, placed(mesh, integers(), columns))
    found, gradients = alone(name)
    want = jax.device_get(found), first_columns(gradients, columns)
    assert_trees_close(jax.device_get(got), want, 2e-5)
    if types is AxisType.Explicit:
        for one, other in zip(*map(jax.tree.leaves, (got[1], arrays)), strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def over(data, tensor):
    return {"data": data, "tensor": tensor}


@pytest.mark.parametrize(
    ("path", "sizes", "types"),
    [
        ("fused", over(8, 1), AxisType.Auto),
        ("fused", over(4, 2), AxisType.Explicit),
        ("logits", over(2, 4), AxisType.Explicit),
    ],
)
def test_a_mesh_changes_no_number(path, sizes, types):
    check("parallel", path, sizes, types)


@pytest.mark.slow
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("sizes", [over(8, 1), over(4, 2), over(2, 4), over(1, 8)])
@pytest.mark.parametrize("path", ["logits", "fused"])
@pytest.mark.parametrize("gets_mesh", [True, False])
def test_every_mesh_changes_no_number(path, sizes, types, gets_mesh):
    check("parallel", path, sizes, types, gets_mesh=gets_mesh)


@pytest.mark.parametrize(
    ("path", "types"), [("logits", AxisType.Auto), ("fused", AxisType.Explicit)]
)
def test_the_loss_needs_no_mesh(path, types):
    check("parallel", path, over(2, 4), types, gets_mesh=False)


@pytest.mark.parametrize(
    ("path", "columns"),
    [
        ("fused", V),
        ("logits", V),
        pytest.param("fused", V + 1, marks=pytest.mark.slow),
    ],
)
def test_a_vocabulary_that_the_devices_cannot_share_evenly(path, columns):
    check("sequential", path, over(1, 8), columns=columns)


@pytest.mark.parametrize(
    ("path", "types"),
    [
        ("logits", AxisType.Explicit),
        ("fused", AxisType.Auto),
        pytest.param("logits", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("fused", AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_rows_over_two_axes_and_sharded_parameters(path, types):
    check("sequential", path, {"data": 2, "fsdp": 2, "tensor": 2}, types)


@pytest.mark.parametrize(
    ("name", "path", "types"),
    [
        ("parallel", "logits", AxisType.Explicit),
        ("sequential", "fused", AxisType.Auto),
        pytest.param("parallel", "fused", AxisType.Auto, marks=pytest.mark.slow),
        pytest.param("sequential", "logits", AxisType.Explicit, marks=pytest.mark.slow),
    ],
)
def test_rows_that_devices_share(name, path, types):
    """Shifts, windows, runs and segments reach over the edges of the shards."""
    check(name, path, {"data": 2, "sequence": 2, "tensor": 2}, types)


def test_adaptive_heads():
    check("adaptive", "logits", over(2, 4))


@pytest.mark.slow
@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_rows_over_all_devices(types):
    check("sequential", "fused", {"sequence": 8, "tensor": 1}, types)


@pytest.mark.parametrize(
    ("sizes", "rows", "types", "columns"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, 16, AxisType.Auto, COLUMNS),
        ({"data": 2, "fsdp": 2, "tensor": 2}, 16, AxisType.Explicit, COLUMNS),
        ({"data": 2, "sequence": 2, "tensor": 2}, 16, AxisType.Auto, V),
        # Eighths of 64 rows are a tile; sixteenths would not be.
        ({"fsdp": 8}, 8, AxisType.Auto, V),
        ({"data": 2, "fsdp": 4}, 8, AxisType.Explicit, COLUMNS),
    ],
)
def test_a_device_keeps_its_rows_of_the_projections_gradient(
    sizes, rows, types, columns
):
    hidden, head = projection_arrays(64)
    head = head[:, :columns]
    want = first_columns(projection_gradients_alone(64), columns)
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(types,) * len(sizes)
    )
    sharded = projection_gradients(
        mesh=mesh,
        batch_axes=tuple(a for a in ROWS if a in sizes),
        sequence_axis="sequence" if "sequence" in sizes else None,
        vocab_axis="tensor" if "tensor" in sizes else None,
    )
    targets = integers()["targets"]
    arrays = {"hidden_states": hidden, "lm_head": head, "targets": targets}
    context = jax.set_mesh(mesh) if types is AxisType.Explicit else None
    with context or contextlib.nullcontext():
        got = sharded(*placed(mesh, arrays, columns).values())
    assert_trees_close(jax.device_get(got), want, 2e-5)
    if types is AxisType.Auto and columns == COLUMNS:
        shard = got[1].sharding.shard_shape(got[1].shape)
        assert shard == (rows, columns // sizes.get("tensor", 1))


def projection_arrays(width):
    """Hidden states and a projection."""
    rng = np.random.default_rng(2)
    head = rng.normal(size=(width, COLUMNS)) / width**0.5
    hidden = rng.normal(size=(B, S, width))
    return hidden.astype(np.float32), head.astype(np.float32)


def projection_gradients(**layout):
    """The function that returns the gradients of hidden states and the projection."""
    loss_fn = ava_jax.create_unified_loss(vocab_size=V, **layout)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(hidden, head, targets):
        return loss_fn(
            loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
        )[0]

    return gradients


@functools.cache
def projection_gradients_alone(width):
    """What one device computes."""
    arrays = projection_arrays(width)
    return projection_gradients()(*arrays, integers()["targets"])


def window(loss_fn, head, rows):
    """Gradient, aux and state of a step over micro-batches."""
    masks = {k: rows[k] for k in ("targets", "attention_mask")}
    normalizers = loss_fn.normalizers(**masks)
    state = loss_fn.init()

    def loss(head, micro):
        total, _, stats = loss_fn.accumulate(
            state, lm_head=head, normalizers=normalizers, **micro
        )
        return total, stats

    def add(grads, micro):
        more, stats = jax.grad(loss, has_aux=True)(head, micro)
        return grads + more, stats

    grads, stats = jax.lax.scan(add, jnp.zeros_like(head), rows)
    stats = jax.tree.map(lambda x: jnp.sum(x, 0), stats)
    after = loss_fn.commit(state, stats)
    return grads, loss_fn.summary(after, stats), after


@pytest.mark.parametrize("types", [AxisType.Auto, AxisType.Explicit])
def test_micro_batches_on_a_mesh(types):
    """The routing bias moves by the loads of all devices and micro-batches, once."""
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(types,) * 2)
    config = {
        "vocab_size": V,
        "num_experts": E,
        "use_moe_balancing": True,
        "moe_balancing_type": "bias",
        "bias_update_rate": 0.25,
    }
    names = ("hidden_states", "gate_logits")
    arrays = {k: v for k, v in floats(COLUMNS).items() if k in names}
    ints = {k: v for k, v in integers().items() if k != "segment_ids"}
    rows = {**arrays, **ints}
    head = floats(COLUMNS)["lm_head"]

    alone = ava_jax.create_unified_loss(config)
    whole = {k: v[None] for k, v in rows.items()}
    want = jax.jit(window, static_argnums=0)(alone, head, whole)
    sharded = ava_jax.create_unified_loss(
        config, mesh=mesh, batch_axes="data", vocab_axis="tensor"
    )
    halves = {k: v.reshape(2, B // 2, *v.shape[1:]) for k, v in rows.items()}
    context = jax.set_mesh(mesh) if types is AxisType.Explicit else None
    with context or contextlib.nullcontext():
        placed_head = jax.device_put(head, NamedSharding(mesh, P(None, "tensor")))
        halves = jax.device_put(halves, NamedSharding(mesh, P(None, "data")))
        got = jax.jit(window, static_argnums=0)(sharded, placed_head, halves)
    assert_trees_close(jax.device_get(got), jax.device_get(want), 2e-5)
    assert np.any(want[2].moe_balancing.bias != 0)


def test_a_mean_over_shards_is_far_off():
    """The usual mistake: each device divides by its own number of tokens."""
    arrays, ints = floats(COLUMNS), integers()
    loss_fn = ava_jax.create_unified_loss(vocab_size=V)
    step = jax.jit(
        lambda h, t, m: loss_fn(
            loss_fn.init(),
            hidden_states=h,
            lm_head=jax.device_put(arrays["lm_head"]),
            targets=t,
            attention_mask=m,
        )[0]
    )
    rows = (arrays["hidden_states"], ints["targets"], ints["attention_mask"])
    shards = [step(*(x[i : i + 2] for x in rows)) for i in range(0, B, 2)]
    assert abs(np.mean(shards) - step(*rows)) > 0.02


MESH = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"batch_axes": "data"}, "pass mesh="),
        ({"mesh": MESH, "batch_axes": ("data", "fsdp")}, "'fsdp' is not an axis"),
        ({"mesh": MESH, "batch_axes": "data", "vocab_axis": "data"}, "given twice"),
    ],
)
def test_layouts_that_make_no_sense(layout, message):
    with pytest.raises(ValueError, match=message):
        ava_jax.create_unified_loss(vocab_size=V, **layout)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"batch_axes": ("data", "tensor")}, "8 rows, which the 8 devices"),
        ({"sequence_axis": "data"}, "6 tokens a row, which the 4 devices"),
    ],
)
def test_tokens_that_the_devices_cannot_share_evenly(axes, message):
    loss_fn = ava_jax.create_unified_loss(vocab_size=V, mesh=MESH, **axes)
    short = 6 if "sequence_axis" in axes else S
    rows = B if "sequence_axis" in axes else B - 1
    logits = jax.ShapeDtypeStruct((rows, short, V), jnp.float32)
    targets = jax.ShapeDtypeStruct((rows, short), jnp.int32)
    call = functools.partial(loss_fn, loss_fn.init())
    with pytest.raises(ValueError, match=message.replace("8 rows", "7 rows")):
        jax.eval_shape(call, logits=logits, targets=targets)


def test_a_loss_that_knows_its_mesh_is_hashable_and_equal():
    one, two = (
        ava_jax.create_unified_loss(vocab_size=V, mesh=MESH, batch_axes=["data"])
        for _ in range(2)
    )
    assert one == two
    assert hash(one) == hash(two)
    assert one != ava_jax.create_unified_loss(vocab_size=V)

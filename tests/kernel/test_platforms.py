"""The implementation of each platform, and what its program computes and stores."""

import functools
import types
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AbstractMesh,
    AxisType,
    NamedSharding,
    use_abstract_mesh,
)
from jax.sharding import PartitionSpec as P
from support.cards import mesh_of
from support.kernel_batches import B, D, V
from support.kernel_rows import IMPLEMENTATIONS, MESH
from support.programs import arrays_of, dot_flops

import ava_jax
from ava_jax import Query, Vocabulary, token_statistics
from ava_jax.kernel import platforms, statistics
from ava_jax.kernel.platforms import Implementation, Target

pytestmark = pytest.mark.every_platform

# What a program computes and stores ------------------------------------------------


def fused_loss(dtype: Any = jnp.bfloat16, **options):
    """The loss of hidden states and lm_head, and both."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, use_ngram_penalty=False, chunk_size=13, block_size=5, **options
    )

    def loss(hidden, head):
        targets = jnp.ones(hidden.shape[:2], jnp.int32)
        return loss_fn(
            loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
        )[0]

    return loss, (jnp.ones((B, 26, D), dtype), jnp.ones((D, V), dtype))


@pytest.mark.parametrize("implementation", [None, "reference", *IMPLEMENTATIONS])
@pytest.mark.parametrize(
    ("arguments", "units"), [((), 2), ((0,), 4), ((1,), 4), ((0, 1), 6)]
)
def test_what_is_not_differentiated_costs_nothing(arguments, units, implementation):
    loss, operands = fused_loss(implementation=implementation, logit_soft_cap=5.0)
    run = jax.grad(loss, argnums=arguments) if arguments else loss
    jaxpr = jax.make_jaxpr(run)(*operands).jaxpr
    # Blocks of 5 tokens repeat some of a chunk of 13, and their logits.
    blocks = 13 if implementation == "cpu" else 15
    # xla also computes one in 128 of a token's logits to estimate the row max.
    sampled = max(min(128, V // 128), 1) if implementation in (None, "xla") else 0
    logits = 2 * B * 26 * D * (V + sampled)
    # JAX differentiates the reference, and makes the logits of a block again for it.
    logits *= 2 if implementation == "reference" and arguments else 1
    products = (units - 2) * B * 26 * D * V
    assert dot_flops(jaxpr) <= (logits + products) * blocks / 13
    assert dot_flops(jaxpr) >= logits + products
    assert (((D, V), jnp.dtype("float32")) in arrays_of(jaxpr)) == (1 in arguments)


# Which implementation runs ---------------------------------------------------------


def lowered(function, operands, platform):
    traced = jax.jit(function).trace(*operands)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("path", ["fused", "statistics"])
def test_the_platform_of_the_lowering_chooses(path):
    """All programs are lowered on this CPU, for devices that are not present."""
    if path == "fused":
        loss, operands = fused_loss()
        function = jax.grad(loss, argnums=(0, 1))
    else:
        query = Query(targets=jnp.zeros(9, jnp.int32), active=jnp.ones(9, bool))
        operands = (jnp.ones((9, 256)),)

        def function(z):
            return token_statistics(z, query, Vocabulary(256)).nll

    programs = {p: lowered(function, operands, p) for p in ("cpu", "tpu", "cuda")}
    assert programs["cpu"] != programs["tpu"]
    assert programs["cpu"] != programs["cuda"]


def test_one_implementation_on_another_platform():
    loss, operands = fused_loss(jnp.float32, implementation="xla")
    own, _ = fused_loss(jnp.float32)
    program = lowered(loss, operands, "cpu")
    assert program != lowered(own, operands, "cpu")
    np.testing.assert_allclose(
        jax.jit(loss)(*operands), jax.jit(own)(*operands), rtol=1e-6
    )


def test_a_mesh_of_processors_takes_their_implementation(monkeypatch):
    """With a mesh nothing else is traced; without one every implementation is."""
    calls = []
    real = statistics.xla_product.reduce
    monkeypatch.setattr(
        statistics.xla_product,
        "reduce",
        lambda *a, **k: calls.append(a) or real(*a, **k),
    )
    monkeypatch.setattr(statistics, "_MODULES", {"cpu": statistics.cpu})
    loss, operands = fused_loss(mesh=MESH, vocab_axis="vocab")
    jax.make_jaxpr(jax.grad(loss))(*operands)
    assert not calls
    loss, operands = fused_loss()
    jax.make_jaxpr(jax.grad(loss))(*operands)
    assert calls


def test_an_unknown_implementation_is_refused():
    allowed = r"one of \('reference', 'cpu', 'xla', 'mosaic_gpu', None\)"
    with pytest.raises(ValueError, match=f"implementation must be {allowed}, got"):
        ava_jax.create_unified_loss(vocab_size=V, implementation="gpu")


def test_a_kernel_for_gpus_is_refused_elsewhere():
    loss, operands = fused_loss(implementation="mosaic_gpu")
    for step in (loss, jax.grad(loss), jax.jit(loss)):
        with pytest.raises(
            ValueError, match="'mosaic_gpu' is for GPUs, and this program"
        ):
            step(*operands)
    loss, operands = fused_loss(
        implementation="mosaic_gpu", mesh=MESH, vocab_axis="vocab"
    )
    with pytest.raises(ValueError, match="for GPUs, and this program is for cpu"):
        jax.make_jaxpr(loss)(*operands)


def test_a_kernel_is_refused_by_gpus_that_cannot_run_it(monkeypatch):
    card = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0"
    )
    monkeypatch.setattr(platforms, "get_default_device", lambda: card)

    def lowered(kind: str | None, implementation: Implementation = "mosaic_gpu"):
        mesh = AbstractMesh((), ()) if kind is None else mesh_of(kind)
        monkeypatch.setattr(platforms, "get_abstract_mesh", lambda: mesh)
        loss, operands = fused_loss(implementation=implementation)
        traced = jax.jit(loss).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",))

    for kind in (None, "NVIDIA A100", "NVIDIA B200"):
        own = kind or "NVIDIA A100"
        with pytest.raises(ValueError, match=rf"capability 9\.0.* for {own}: leave"):
            lowered(kind)
    assert lowered("NVIDIA H100")
    assert lowered("NVIDIA A100", "xla")
    card.compute_capability = "9.0"
    assert lowered(None)


H100 = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
)
A100 = types.SimpleNamespace(
    platform="gpu", device_kind="NVIDIA A100-SXM4-40GB", compute_capability="8.0"
)


def chosen(
    monkeypatch,
    *,
    oldest=(0,),
    card=None,
    count=1,
    context=None,
    operand=None,
    sharded=None,
):
    """The implementation for GPUs.

    Args:
      monkeypatch: pytest's.
      oldest: the oldest JAX with the kernel.
      card: the default device; None for a processor.
      count: devices of this process.
      context: a mesh in which the program is traced.
      operand: one that its operand is sharded over.
      sharded: a mesh in whose `shard_map` it is.
    """
    monkeypatch.setattr(jax, "device_count", lambda: count)
    monkeypatch.setattr(platforms, "OLDEST_JAX", oldest)
    if card is not None:
        monkeypatch.setattr(platforms, "get_default_device", lambda: card)
    sharding = None if operand is None else NamedSharding(operand, P("x"))
    targets = []

    def run(x):
        return platforms.by_platform(None, None, note, x)

    def note(target, x):
        targets.append(target)
        return x

    if sharded is not None:
        run = jax.shard_map(run, mesh=sharded, in_specs=P("x"), out_specs=P("x"))
    with nullcontext() if context is None else use_abstract_mesh(context):
        jax.jit(run).trace(jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding))
    assert {Target("cpu", "cpu"), Target("xla", "tpu")} < set(targets)
    (found,) = (t.implementation for t in targets if t.platform == "gpu")
    return found


@pytest.mark.parametrize(
    ("card", "named", "implementation"),
    [
        (H100, None, "mosaic_gpu"),
        (A100, None, "xla"),
        (None, None, "xla"),
        (None, "NVIDIA H100 80GB HBM3", "mosaic_gpu"),
        (None, "NVIDIA GH200 480GB", "mosaic_gpu"),
        (None, "NVIDIA A100-SXM4-40GB", "xla"),
        (None, "NVIDIA B200", "xla"),
        (A100, "NVIDIA H200", "mosaic_gpu"),
        (H100, "NVIDIA A100-SXM4-40GB", "xla"),
    ],
)
@pytest.mark.parametrize("where", ["context", "operand", "sharded"])
def test_a_gpu_that_runs_the_kernel_gets_it(
    monkeypatch, card, named, where, implementation
):
    """Whether it is here, or only named by a mesh or by the operands' sharding."""
    place: dict[str, Any] = {} if named is None else {where: mesh_of(named)}
    assert chosen(monkeypatch, card=card, **place) == implementation


def test_what_xla_partitions_has_no_kernel(monkeypatch):
    """Each device would compute it for all tokens."""
    several = mesh_of(H100.device_kind, 8)
    choose = functools.partial(chosen, monkeypatch, card=H100)
    assert choose(count=8) == "xla"
    assert choose(count=8, context=several) == "xla"
    assert choose(count=8, operand=several) == "xla"
    manual = several.update(axis_types=(AxisType.Manual,))
    assert choose(count=8, context=manual) == "mosaic_gpu"
    assert choose(count=8, sharded=several) == "mosaic_gpu"
    half = AbstractMesh(
        (2, 4),
        ("x", "y"),
        (AxisType.Manual, AxisType.Auto),
        abstract_device=several.abstract_device,
    )
    assert choose(count=8, context=half) == "xla"


def test_a_kernel_that_xla_would_have_to_partition_is_refused():
    loss, operands = fused_loss(implementation="mosaic_gpu")
    hidden, head = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(MESH, P()))
        for x in operands
    )
    with pytest.raises(ValueError, match=r"for 4 devices would be .* pass mesh= as"):
        jax.jit(loss).trace(hidden, head).lower(lowering_platforms=("cuda",))


def test_an_older_jax_gets_no_kernel(monkeypatch):
    assert chosen(monkeypatch, card=H100, oldest=(99, 0, 0)) == "xla"


def test_the_default_backend_decides_nothing():
    sources = Path(ava_jax.__path__[0]).rglob("*.py")
    assert not [p.name for p in sources if "default_backend" in p.read_text()]

"""The implementation of each platform, and what its program computes and stores."""

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_batches import B, D, V
from support.kernel_rows import IMPLEMENTATIONS, MESH
from support.programs import arrays_of, dot_flops

import ava_jax
from ava_jax import Query, Vocabulary, token_statistics
from ava_jax.kernel import platforms, statistics
from ava_jax.kernel.platforms import Implementation

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
    card = types.SimpleNamespace(device_kind="NVIDIA A100", compute_capability="8.0")
    monkeypatch.setattr(platforms, "get_default_device", lambda: card)

    def lowered(kind: str | None, implementation: Implementation = "mosaic_gpu"):
        named = None if kind is None else types.SimpleNamespace(device_kind=kind)
        mesh = types.SimpleNamespace(abstract_device=named)
        monkeypatch.setattr(platforms, "get_abstract_mesh", lambda: mesh)
        loss, operands = fused_loss(implementation=implementation)
        traced = jax.jit(loss).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",))

    for kind in (None, "NVIDIA A100"):
        with pytest.raises(ValueError, match=r"capability 9\.0.* A100 has 8\.0: leave"):
            lowered(kind)
    assert lowered("NVIDIA H100")
    assert lowered("NVIDIA A100", "xla")
    card.compute_capability = "9.0"
    assert lowered(None)


def test_the_default_backend_decides_nothing():
    sources = Path(ava_jax.__path__[0]).rglob("*.py")
    assert not [p.name for p in sources if "default_backend" in p.read_text()]

"""Lowered for another platform, the loss is that platform's program.

No compiler is needed here: lowering stops before it.
"""

import dataclasses
import functools
import itertools
import re
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, use_abstract_mesh
from support.cards import mesh_of

from ava_jax.kernel.platforms import Implementation
from benchmarks.programs import CONFIGS, Devices, loss_of

BATCH, LENGTH, WIDTH, VOCAB = 4, 4096, 64, 32000
CONFIG_NAMES = pytest.mark.parametrize("name", list(CONFIGS))
H100, A100 = mesh_of("NVIDIA H100 80GB HBM3"), mesh_of("NVIDIA A100-SXM4-40GB")
PLATFORMS = pytest.mark.parametrize("platform", ["tpu", "cuda"])


@functools.cache
def lowered(
    name: str,
    platform: str,
    implementation: Implementation | None = None,
    card: AbstractMesh | None = None,
) -> str:
    """Returns the program of the loss and its gradients before compilation."""
    here = Devices("v5p")  # without its devices
    config = dataclasses.replace(CONFIGS[name](VOCAB), implementation=implementation)
    loss = loss_of(config, here, "hidden_states", "lm_head", "targets")
    arrays = (
        jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((WIDTH, VOCAB), jnp.bfloat16),
        jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32),
    )
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    with nullcontext() if card is None else use_abstract_mesh(card):
        return step.trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


@CONFIG_NAMES
def test_an_h100_has_the_kernel_in_mosaic_gpu(name: str) -> None:
    kernel = "product_and_sums"
    assert kernel in lowered(name, "cuda", card=H100)
    assert kernel in lowered(name, "cuda", "mosaic_gpu", card=H100)
    assert kernel not in lowered(name, "cuda", "xla", card=H100)
    assert kernel not in lowered(name, "cuda", card=A100)
    assert kernel not in lowered(name, "cuda")
    assert kernel not in lowered(name, "tpu", card=H100)
    with pytest.raises(ValueError, match="is for GPUs, and this program is for tpu"):
        lowered(name, "tpu", "mosaic_gpu")


def splits(text: str) -> set[tuple[int, ...]]:
    """Returns the shapes in which a row of classes is split over two axes."""
    found = {
        tuple(int(n) for n in dims.rstrip("x").split("x"))
        for dims in re.findall(r"tensor<((?:\d+x)+)", text)
    }
    return {
        shape
        for shape in found
        if any(min(a, b) > 1 and a * b == VOCAB for a, b in itertools.pairwise(shape))
    }


@CONFIG_NAMES
@PLATFORMS
def test_accelerators_have_a_program_of_their_own(name: str, platform: str) -> None:
    assert lowered(name, platform) != lowered(name, "cpu")


@CONFIG_NAMES
def test_a_cpu_splits_rows_into_parts_that_its_caches_hold(name: str) -> None:
    """Shows that the next test checks the right property."""
    assert splits(lowered(name, "cpu"))


@CONFIG_NAMES
@PLATFORMS
def test_accelerators_reduce_whole_rows(name: str, platform: str) -> None:
    """Or on GPUs, whose compiler would split them in many, the fewest parts."""
    # The mark of the CPU's program. Should that get another one, look for it here.
    parts = {shape[-2] for shape in splits(lowered(name, platform))}
    assert parts == ({2} if platform == "cuda" else set())

"""The communication of 512 chips: numbers per token and gradients, no logits."""

import functools

import pytest
from support.compiled_programs import Setup, compiled

from benchmarks.hlo import Collective, collectives

DATA, FSDP, TENSOR = 32, 4, 4
# No two of these are equal, neither whole nor per device.
BATCH, LENGTH, WIDTH, VOCAB = 256, 1024, 640, 50176
POD = Setup(
    "v5p",
    f"{BATCH}x{LENGTH}x{WIDTH}x{VOCAB}",
    (("data", DATA), ("fsdp", FSDP), ("tensor", TENSOR)),
)
COLUMNS = VOCAB // TENSOR
# The gradient's rows are sharded over fsdp; a shard is reduced in at most so many parts
# of whole tiles.
PARTS = 10
TOKENS = BATCH * LENGTH // (DATA * FSDP)
NAMES = pytest.mark.parametrize("name", ["plain", "everything"])


@functools.cache
def sent(name: str) -> tuple[list[Collective], list[Collective]]:
    """Returns the collectives of the projection or its gradient, and the others."""
    found = collectives(compiled(POD, name).text)
    projection = [c for c in found if COLUMNS in c.shape and c.size > 4 * COLUMNS]
    return projection, [c for c in found if c not in projection]


@NAMES
def test_nothing_of_the_vocabularys_size_is_sent(name: str) -> None:
    _, others = sent(name)
    assert all(VOCAB not in c.shape and COLUMNS not in c.shape for c in others)
    largest = max(c.size * c.times for c in others)
    # The hidden states' gradient in float32; the logits would be 20 times that.
    assert largest <= 4 * TOKENS * WIDTH
    assert sum(c.size * c.times for c in others) <= 1.2 * 4 * TOKENS * WIDTH


@NAMES
def test_the_projection_is_sent_once(name: str) -> None:
    projection, _ = sent(name)
    gathered = [c for c in projection if c.kind == "all-gather"]
    added = [c for c in projection if c.kind in ("all-reduce", "reduce-scatter")]
    assert [(c.shape, c.times) for c in gathered] == [((WIDTH // FSDP, COLUMNS), 1)]
    assert added
    assert all(c.times in (1, PARTS) for c in added)
    # Once over all devices, or over fsdp and then, a part of it, over data; XLA pads.
    total = sum(c.size * c.times for c in added)
    assert 4 * WIDTH * COLUMNS <= total <= 1.3 * 4 * WIDTH * COLUMNS

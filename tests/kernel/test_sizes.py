"""The sizes of chunks and blocks."""

import itertools

import pytest

from ava_jax.kernel.platforms import Target
from ava_jax.kernel.sizes import (
    MIB,
    Sizes,
    choose_sizes,
    fuses_gradient,
    parts_of_row,
)

CPU = Target("cpu", "cpu")
TPU, GPU = Target("xla", "tpu"), Target("xla", "gpu")
TARGETS = {
    "cpu": CPU,
    "tpu": TPU,
    "gpu": GPU,
    "xla on a cpu": Target("xla", "cpu"),
    "reference": Target("reference", "cpu"),
}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_sizes_fit_the_row(target):
    for batch, length in itertools.product((1, 8, 64), (1, 2, 511, 512, 4096)):
        sizes = choose_sizes(target, batch, length, 50304, 1024)
        assert 1 <= sizes.block <= sizes.chunk <= length


def test_a_processor_handles_what_its_caches_hold():
    sizes = choose_sizes(CPU, 4, 512, 32768, 512)
    assert 4 * sizes.block * 32768 * 4 <= 2 * MIB
    assert 256 <= 4 * sizes.chunk <= 368
    long = choose_sizes(CPU, 4, 4096, 8192, 512)
    assert choose_sizes(CPU, 4, 4096, 8192, 512, itemsize=2).chunk < long.chunk


def test_a_chunk_of_a_wide_vocabulary_is_still_worth_its_product():
    assert 4 * choose_sizes(CPU, 4, 128, 256000, 512).chunk == 256


@pytest.mark.parametrize(
    ("target", "block", "chunk"), [(TPU, 512, 2048), (GPU, 2048, 4096)]
)
def test_an_accelerator_handles_what_pays_for_reading_the_projection(
    target, block, chunk
):
    sizes = choose_sizes(target, 4, 4096, 128256, 1024, itemsize=2)
    assert (sizes.chunk, sizes.block) == (chunk // 4, block // 4)
    short = choose_sizes(target, 4, 100, 128256, 1024, itemsize=2)
    assert (short.chunk, short.block) == (100, min(100, block // 4))


@pytest.mark.parametrize(
    ("features", "first"), [(1024, 2048), (2048, 2048), (3000, 2048), (4096, 4096)]
)
def test_logits_of_a_first_block_take_the_memory_of_the_gradient(features, first):
    """That of the projection, which begins with the first chunk."""
    sizes = choose_sizes(GPU, 4, 4096, 128256, features, itemsize=2)
    assert sizes == Sizes(1024, 512, first=first // 4)
    given = choose_sizes(GPU, 4, 4096, 128256, features, itemsize=2, block=300)
    assert given.first == given.block == 300


@pytest.mark.parametrize(
    ("target", "most_of_block"), [(TPU, 512 * MIB), (GPU, 1024 * MIB)]
)
def test_a_wide_vocabulary_takes_no_more_memory(target, most_of_block):
    width = 1_000_000
    for batch, itemsize in itertools.product((1, 4), (2, 4)):
        sizes = choose_sizes(target, batch, 4096, width, 1024, itemsize=itemsize)
        block, chunk = 4 * batch * sizes.block * width, batch * sizes.chunk * width
        assert block <= most_of_block
        assert itemsize * chunk <= 1024 * MIB
        # The sizes are close to the limits.
        assert 3 * block >= most_of_block
        assert 3 * itemsize * chunk >= 1024 * MIB


def test_a_gradient_within_the_products_takes_a_chunk_of_one_block():
    for width, tokens in ((50304, 2048), (151936, 2048), (1_000_000, 512)):
        sizes = choose_sizes(TPU, 4, 4096, width, 512, itemsize=2, is_one_block=True)
        assert sizes == Sizes(tokens // 4, tokens // 4)
    given = {"chunk": 100, "block": 50}
    sizes = choose_sizes(TPU, 4, 4096, 50304, 512, is_one_block=True, **given)
    assert sizes == Sizes(100, 50)
    assert fuses_gradient(2560)
    assert not fuses_gradient(4096)


@pytest.mark.parametrize("target", [TPU, GPU])
def test_logits_that_are_given_are_handled_whole(target):
    sizes = choose_sizes(target, 4, 4096, 128256, None)
    assert sizes == Sizes(4096, 4096)
    cut = choose_sizes(target, 4, 4096, 128256, None, block=100)
    assert cut == Sizes(4096, 100)


@pytest.mark.parametrize(
    ("width", "parts"),
    [(16384, 1), (50304, 4), (128256, 8), (151936, 16), (32768, 2), (50261, 1)],
)
def test_a_gpu_sums_long_rows_in_few_parts(width, parts):
    """Of 16384 columns at most; 50261 is a prime number."""
    assert parts_of_row(GPU, width) == parts
    assert parts_of_row(TPU, width) == 1


def test_parts_are_of_equal_size():
    """A last block of one token would cost as much as a full one."""
    block = choose_sizes(CPU, 1, 1025, 2**19 // 128, 512).block
    assert -(-1025 // block) * block - 1025 < 12


@pytest.mark.parametrize("length", [1025, 2049, 3000, 4095, 8000])
def test_parts_on_an_accelerator_are_whole_tiles_of_almost_equal_size(length):
    sizes = choose_sizes(TPU, 1, length, 128256, 1024, itemsize=2)
    for size, whole in ((sizes.chunk, length), (sizes.block, sizes.chunk)):
        assert size % 8 == 0 or size == whole
        parts = -(-whole // size)
        assert parts * size - whole < 8 * parts


@pytest.mark.parametrize("given", [1, 5, 100])
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_a_given_size_is_taken(target, given):
    sizes = choose_sizes(target, 2, 50, 32, 8, chunk=given, block=given)
    assert (sizes.chunk, sizes.block) == (min(given, 50), min(given, 50))

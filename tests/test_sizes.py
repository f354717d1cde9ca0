"""How much is handled at a time."""

import jax
import pytest

from ava_jax.kernel.sizes import Sizes, choose_sizes


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("length", [1, 2, 511, 512, 4096])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_sizes_fit_the_row(batch, length):
    sizes = choose_sizes(batch, length, 50304)
    assert 1 <= sizes.block <= sizes.chunk <= length


def test_a_processor_handles_what_its_caches_hold():
    sizes = choose_sizes(4, 512, 32768)
    assert 4 * sizes.block * 32768 * 4 <= 2 * 2**20
    assert 256 <= 4 * sizes.chunk <= 512
    short = choose_sizes(4, 512, 32768, itemsize=2)
    assert short.chunk < sizes.chunk


def test_a_chunk_of_a_wide_vocabulary_is_still_worth_its_product():
    assert 4 * choose_sizes(4, 128, 256000).chunk == 256


@pytest.mark.usefixtures("accelerator")
def test_an_accelerator_reduces_chunks_whole():
    assert choose_sizes(4, 8192, 128256) == Sizes(2048, 8192)
    assert choose_sizes(4, 100, 128256) == Sizes(100, 100)


def test_parts_are_of_equal_size():
    """A last block of one token would cost as much as a full one."""
    block = choose_sizes(1, 1025, 2**19 // 128).block
    assert -(-1025 // block) * block - 1025 < 12


@pytest.mark.parametrize("given", [1, 5, 100])
def test_a_given_size_is_taken(given):
    sizes = choose_sizes(2, 50, 32, 4, given, given)
    assert (sizes.chunk, sizes.block) == (min(given, 50), min(given, 50))

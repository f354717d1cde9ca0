"""Log-probabilities compiled for real chips: their memory and their precision."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import ava_jax
from benchmarks import hlo
from benchmarks.topologies import compile_for, devices, given, missing

# Temporary memory as a ratio to the naive loss's. The goal is 0.25; a GPU's program has
# a second float32 sum of the projection's gradient, in the loop over chunks.
LIMITS = {"v5p": 0.25, "h100": 0.44}
CHIPS = pytest.mark.parametrize("chip", list(LIMITS))
# Llama-3 8B.
LARGE = (4, 4096, 4096, 128256)
SMALL = (2, 512, 256, 4096)


def ours(mask: Any, targets: Any, hidden: Any, head: Any, **options: Any) -> jax.Array:
    """A policy's loss: nonlinear, so that the values are needed."""
    out = ava_jax.token_log_probs(
        targets=targets,
        hidden_states=hidden,
        lm_head=head,
        attention_mask=mask,
        **options,
    )
    return jnp.sum(jnp.exp(out.log_probs) - 0.01 * out.entropy)


def naive(mask: Any, targets: Any, hidden: Any, head: Any) -> jax.Array:
    """The same of `jax.nn.log_softmax`."""
    every = jax.nn.log_softmax((hidden @ head).astype(jnp.float32))
    log_probs = jnp.take_along_axis(every, targets[..., None], -1)[..., 0]
    entropy = -jnp.sum(jnp.exp(every) * every, -1)
    return jnp.sum(mask * (jnp.exp(log_probs) - 0.01 * entropy))


@functools.cache
def program(
    chip: str,
    loss: Callable[..., jax.Array],
    shape: tuple[int, ...],
    dtype: str,
    precision: str | None = None,
    is_masked: bool = False,
) -> Any:
    """Returns the compiled loss with the gradients of hidden states and head."""
    if reason := missing(chip):
        pytest.skip(reason)
    batch, length, width, vocab = shape
    place = SingleDeviceSharding(devices(chip)[0])
    arguments = [
        given((batch, length), jnp.float32, place),
        given((batch, length), jnp.int32, place),
        given((batch, length, width), dtype, place),
        given((width, vocab), dtype, place),
    ]

    def step(mask, targets, hidden, head):
        options: dict[str, Any] = {}
        if loss is ours:
            options = {"precision": precision}
            mask = mask if is_masked else None
        return jax.value_and_grad(loss, (2, 3))(mask, targets, hidden, head, **options)

    return compile_for(chip, step, *arguments)


def temporaries(compiled: Any) -> int:
    """Returns the bytes of temporary memory."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@CHIPS
@pytest.mark.parametrize("is_masked", [False, True])
def test_memory(chip: str, is_masked: bool) -> None:
    """A part of the naive loss's, also where a mask is known at run time only."""
    own = program(chip, ours, LARGE, "bfloat16", None, is_masked)
    base = program(chip, naive, LARGE, "bfloat16")
    assert temporaries(own) <= LIMITS[chip] * temporaries(base)
    tokens, vocab = LARGE[0] * LARGE[1], LARGE[3]
    arrays = hlo.parse(str(own.as_text())).arrays()
    assert max(array.size for array in arrays) < tokens * vocab


def highest(text: str) -> int:
    """Returns how many products have operands of the highest precision."""
    return len(re.findall(r"operand_precision=\{highest,highest\}", text))


def test_the_precision_of_a_tpus_products() -> None:
    """float32 is multiplied in bfloat16 unless something else is said."""
    default = program("v5p", ours, SMALL, "float32")
    exact = program("v5p", ours, SMALL, "float32", "highest")
    assert highest(str(default.as_text())) == 0
    # The forward pass, the logits again, and the two products of the gradient.
    assert highest(str(exact.as_text())) >= 4

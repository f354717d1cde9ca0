"""Streams text: tokens as they are generated, decoded to whole characters."""

import functools
import itertools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from tokenizers import Tokenizer

from trainer.decode.decoder import Cursor, Decoder, Sampling
from trainer.decode.speculate import DraftState, Speculator
from trainer.run.trained import Trained

# What the tokenizer shows for bytes that are not yet a whole character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"

# Not made anew by each call: another text of the same lengths compiles nothing.
_begin_tokens = jax.jit(Decoder.begin, static_argnums=0)
_begin_drafts = jax.jit(Speculator.begin, static_argnums=0, static_argnames="count")
_call = jax.jit(Speculator.call, static_argnums=0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _advance(
    decoder: Decoder,
    sampling: Sampling,
    params: optax.Params,
    bias: Array | None,
    keys: Array,
    cursor: Cursor,
    number: Int[Array, ""],
) -> tuple[Cursor, Int[Array, "1"]]:
    token = decoder.pick(params, cursor, keys[number], sampling)
    return decoder.extend(params, bias, cursor, token), token


def stream_tokens(
    trained: Trained, prompt: Sequence[int], count: int, sampling: Sampling, seed: int
) -> Iterator[list[int]]:
    """Yields `count` tokens one by one, after an empty list when all is compiled."""
    decoder = Decoder.of(trained.model, len(prompt) + count)
    learned = (trained.params, trained.bias)
    # To take one out here would take longer than the step does.
    keys = jax.random.split(jax.random.key(seed), count)
    step = functools.partial(_advance, decoder, sampling, *learned, keys)
    cursor = _begin_tokens(decoder, *learned, *_one_row(prompt))
    jax.block_until_ready(step(cursor, np.int32(0)))
    yield []
    for number in range(count):
        cursor, token = step(cursor, np.int32(number))
        yield [token.item()]


def stream_drafts(
    trained: Trained, prompt: Sequence[int], count: int
) -> Iterator[list[int]]:
    """Yields `count` tokens, as many at a time as a call of the model yields."""
    speculator = Speculator.of(trained.model, len(prompt) + count)
    learned = (trained.params, trained.bias)
    step = functools.partial(_call, speculator, *learned)
    given = (speculator, *learned, *_one_row(prompt))
    state: DraftState = _begin_drafts(*given, count=count)
    jax.block_until_ready(step(state))
    yield []
    shown, stop = len(prompt), state.stop.item()
    while True:
        read = state.read.item()
        # Not a slice of a JAX array, which is compiled for every new length.
        yield np.asarray(state.rows)[0, shown : read + 1].tolist()
        if read == stop:
            return
        shown = read + 1
        state, _ = step(state)


def _one_row(prompt: Sequence[int]) -> tuple[Int[Array, "1 S"], Int[Array, "1"]]:
    return jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)], jnp.int32)


def whole_characters(
    tokenizer: Tokenizer, tokens: Iterator[list[int]], eos: int
) -> Iterator[str]:
    """Decodes tokens up to the end of text; yields characters when they are whole."""
    ids: list[int] = []
    shown = 0
    for chunk in tokens:
        ids += itertools.takewhile(lambda token: token != eos, chunk)
        text = tokenizer.decode(ids)
        ready = len(text.rstrip(UNFINISHED))
        yield text[shown:ready]
        shown = max(shown, ready)
        if eos in chunk:
            break
    yield tokenizer.decode(ids)[shown:]

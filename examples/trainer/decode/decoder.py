"""Decoding with a key-value cache: read prompts, then pick tokens one by one."""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax.typing import VariableDict
from jaxtyping import Array, Bool, Float, Int, Shaped

from trainer.model.language_model import LanguageModel, with_params
from trainer.model.layers import Batch


def likeliest(logits: Float[Array, "*n V"]) -> Int[Array, "*n"]:
    """Returns the first argmax; XLA's own takes several times as long."""
    size = logits.shape[-1]
    best = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(size, dtype=jnp.int32)
    return jnp.min(jnp.where(logits < best, size, ids), axis=-1)


def take_at(x: Shaped[Array, "B S *m"], positions: Int[Array, "B *n"]) -> Array:
    """Returns the entries of each row at its own positions."""
    rows = jnp.arange(x.shape[0]).reshape(-1, *[1] * (positions.ndim - 1))
    return x[rows, positions]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is picked; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    """Divides the logits; 0 is greedy."""
    top_k: int | None = None
    """Keep only this many of the likeliest tokens."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities first add up to this."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")

    def pick(self, logits: Float[Array, "B V"], key: Array) -> Int[Array, "B"]:
        """Returns one token per row."""
        if self.temperature == 0:
            return likeliest(logits)
        if self.top_k is None and self.top_p == 1:
            # Nothing is left out, so that nothing has to be sorted.
            drawn = jax.random.categorical(key, logits / self.temperature)
            return drawn.astype(jnp.int32)
        count = min(self.top_k or logits.shape[-1], logits.shape[-1])
        best, ids = jax.lax.top_k(logits / self.temperature, count)
        shares = jax.nn.softmax(best)
        before = jnp.cumsum(shares, -1) - shares
        kept = jnp.where(before < self.top_p, best, -jnp.inf)
        chosen = jax.random.categorical(key, kept)[:, None]
        return jnp.take_along_axis(ids, chosen, 1)[:, 0].astype(jnp.int32)


GREEDY = Sampling()


class Cursor(NamedTuple):
    """The rows as far as they have been read.

    Attributes:
      cache: keys and values of the tokens that were read.
      hidden: hidden states of the last token of each row.
      length: how many tokens of each row were read.
    """

    cache: VariableDict
    hidden: Float[Array, "B D"]
    length: Int[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model that continues reading where it stopped.

    Args:
      model: with a `cache_length`.
    """

    model: LanguageModel

    @classmethod
    def of(cls, model: LanguageModel, length: int) -> "Decoder":
        """Returns a decoder for rows of at most `length` tokens.

        It computes in float32, as the parameters are: rounded to bfloat16, many logits
        are equal.
        """
        return cls(model.clone(cache_length=length, dtype=jnp.float32))

    def empty_cache(self, rows: int) -> VariableDict:
        """Returns the empty cache of a number of rows."""
        token = jnp.zeros((rows, 1), jnp.int32)
        batch = Batch(token, token, token, token)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), batch)["cache"]
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def read(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        cache: VariableDict,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S D"], VariableDict]:
        """Reads tokens at their positions; returns hidden states and the new cache."""
        ones = jnp.ones_like(tokens)
        out, changed = self.model.apply(
            {**with_params(params), "cache": cache},
            Batch(tokens, tokens, ones, positions),
            bias,
            method=LanguageModel.hidden_states,
            mutable=["cache"],
        )
        hidden, _ = cast(tuple[Array, Array], out)
        return hidden, changed["cache"]

    def read_prompts(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        prompts: Int[Array, "B S"],
    ) -> tuple[Float[Array, "B S D"], VariableDict]:
        """Reads from the beginning; returns hidden states and the cache."""
        rows, width = prompts.shape
        positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompts.shape)
        return self.read(params, bias, self.empty_cache(rows), prompts, positions)

    def begin(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        prompts: Int[Array, "B S"],
        lengths: Int[Array, "B"],
    ) -> Cursor:
        """Reads the first `lengths` tokens, at least one, of each row."""
        hidden, cache = self.read_prompts(params, bias, prompts)
        return Cursor(cache, take_at(hidden, lengths - 1), lengths)

    def extend(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        cursor: Cursor,
        tokens: Int[Array, "B"],
    ) -> Cursor:
        """Reads one more token of each row."""
        hidden, cache = self.read(
            params, bias, cursor.cache, tokens[:, None], cursor.length[:, None]
        )
        return Cursor(cache, hidden[:, 0], cursor.length + 1)

    def pick(
        self, params: optax.Params, cursor: Cursor, key: Array, sampling: Sampling
    ) -> Int[Array, "B"]:
        """Picks the next token of each row."""
        return sampling.pick(self.logits(params, cursor.hidden), key)

    def logits(
        self, params: optax.Params, hidden: Float[Array, "*n D"]
    ) -> Float[Array, "*n V"]:
        """Returns the logits of the next token, without the padding columns."""
        loss = self.model.loss
        head = cast(Array, with_params(params)["params"]["lm_head"])
        logits = (hidden @ head.astype(hidden.dtype)).astype(jnp.float32)
        logits = logits[..., : loss.vocab_size]
        cap = loss.logit_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


@functools.partial(jax.jit, static_argnames=("model", "count", "sampling"))
def generate(
    model: LanguageModel,
    params: optax.Params,
    bias: Float[Array, "L E"] | None,
    prompts: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    key: Array,
    *,
    count: int,
    sampling: Sampling = GREEDY,
) -> Int[Array, "B C"]:
    """Continues each prompt by `count` tokens, past an end of text as well.

    Args:
      model: that was trained.
      params: its parameters.
      bias: of the routers, from the loss state.
      prompts: one per row, left-aligned; tokens after `lengths` are ignored.
      lengths: lengths of the prompts, at least 1.
      key: random key of the sampling.
      count: number of tokens to generate.
      sampling: how to pick a token.
    """
    decoder = Decoder.of(model, prompts.shape[1] + count)

    def step(cursor: Cursor, key: Array) -> tuple[Cursor, Int[Array, "B"]]:
        token = decoder.pick(params, cursor, key, sampling)
        return decoder.extend(params, bias, cursor, token), token

    cursor = decoder.begin(params, bias, prompts, lengths)
    keys = jax.random.split(key, count)
    cursor, tokens = jax.lax.scan(step, cursor, keys[:-1])
    last = decoder.pick(params, cursor, keys[-1], sampling)
    return jnp.concatenate([tokens, last[None]]).T


def before_end(ids: Int[Array, "B S"], eos: int) -> Bool[Array, "B S"]:
    """Returns a mask of the tokens before the first end of text of each row."""
    return jnp.cumsum(ids == eos, axis=1) == 0

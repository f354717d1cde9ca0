"""Self-speculative greedy decoding: the multi-token prediction heads draft.

A call of the model reads the newest token and the K drafts after it. Drafts are
accepted as long as they equal the model's own predictions, and its prediction after the
last accepted draft is one token more. So a call yields up to K + 1 tokens, the same as
decoding one by one (Stern et al. 2018; with heads as drafters: Gloeckle et al. 2024,
DeepSeek-AI 2024).

Reading several tokens at once rounds differently from reading one, so where the two
largest logits are almost equal, the other one could win. Such a token is decided by
reading one by one all tokens that were not read so before, each at most once.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax.typing import VariableDict
from jaxtyping import Array, Bool, Float, Int, Shaped

from trainer.decode.decoder import Decoder, likeliest, take_at
from trainer.model.language_model import LanguageModel, is_adaptive, with_params
from trainer.model.layers import Batch

# Logits closer than this, relative to the larger one, may change order by rounding. It
# is 250 float32 ulps; up to 10 were seen between reading one token and several.
NEAR = 3e-5


class DraftState(NamedTuple):
    """The state of the rows, with drafts of their next tokens.

    Attributes:
      cache: keys and values of the tokens that were read.
      rows: tokens that were read, the newest one, and drafts after it.
      read: number of tokens that were read, which is the position of the newest.
      stop: position of the last token wanted; a row that has reached it stays.
      confident: whether there are drafts.
      settled: how many of the read tokens were read one by one, or in the prompt.
      hidden: hidden states of all tokens that were read; sequential heads need them.
    """

    cache: VariableDict
    rows: Int[Array, "B C"]
    read: Int[Array, "B"]
    stop: Int[Array, "B"]
    confident: Bool[Array, "B"]
    settled: Int[Array, "B"]
    hidden: Float[Array, "B C D"] | None

    @property
    def is_done(self) -> Bool[Array, "B"]:
        """Which rows have all their tokens."""
        return self.read >= self.stop


class Calls(NamedTuple):
    """Statistics of calls, per row.

    Attributes:
      drafted: number of drafts that were checked; 0 where the gate wanted none.
      accepted: number of drafts accepted, from the first. A call yields one token more.
      redone: whether the last token was a near tie and was decided one by one.
    """

    drafted: Int[Array, "*n"]
    accepted: Int[Array, "*n"]
    redone: Bool[Array, "*n"]


class Speculated(NamedTuple):
    """Generated tokens and the calls they took.

    Attributes:
      tokens: as `generate` makes them.
      calls: of the model, after the one that reads the prompt and makes a token too.
      record: of each call; zeros after a row's last. The last one may go too far.
    """

    tokens: Int[Array, "B C"]
    calls: Int[Array, "B"]
    record: Calls


@dataclasses.dataclass(frozen=True)
class Speculator:
    """A decoder that drafts with the model's own further heads."""

    decoder: Decoder

    @classmethod
    def of(cls, model: LanguageModel, length: int) -> "Speculator":
        """Returns a speculator for rows of at most `length` tokens.

        Raises:
          ValueError: the model has no heads to draft with.
        """
        if not (model.loss.use_mtp or is_adaptive(model.loss)):
            raise ValueError(
                "speculative decoding drafts with the heads of multi-token prediction, "
                "and this model has none: its loss needs use_mtp=True or "
                'primary_loss_type="adaptive_mtp"'
            )
        return cls(Decoder.of(model, length))

    @property
    def drafts(self) -> int:
        """Number of tokens that the heads draft (K)."""
        return self.decoder.model.loss.num_future_tokens

    @property
    def is_sequential(self) -> bool:
        """Whether the heads build on each other and have attention of their own."""
        loss = self.decoder.model.loss
        return loss.mtp_type == "sequential" and not is_adaptive(loss)

    def begin(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        prompts: Int[Array, "B S"],
        lengths: Int[Array, "B"],
        count: int,
    ) -> DraftState:
        """Reads the prompts, generates one token each, and drafts."""
        decoder, width = self.decoder, prompts.shape[1]
        hidden, cache = decoder.read_prompts(params, bias, prompts)
        padding = ((0, 0), (0, count + 2 * self.drafts))
        last = take_at(hidden, lengths - 1)
        token = likeliest(decoder.logits(params, last))
        state = DraftState(
            cache=cache,
            rows=write_at(jnp.pad(prompts, padding), lengths[:, None], token[:, None]),
            read=lengths,
            stop=lengths + count - 1,
            confident=jnp.ones_like(lengths, bool),
            settled=lengths,
            hidden=jnp.pad(hidden, (*padding, (0, 0))) if self.is_sequential else None,
        )
        return self._draft(params, state, last, jnp.zeros_like(lengths), width)

    def call(
        self, params: optax.Params, bias: Float[Array, "L E"] | None, state: DraftState
    ) -> tuple[DraftState, Calls]:
        """Calls the model once: verifies the drafts, adds a token, drafts again."""
        read = functools.partial(self._read, params, bias)
        if not is_adaptive(self.decoder.model.loss):
            return read(self.drafts, state)
        wide, narrow = (functools.partial(read, k) for k in (self.drafts, 0))
        is_wanted = jnp.any(state.confident & ~state.is_done)
        return jax.lax.cond(is_wanted, wide, narrow, state)

    def _read(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        drafts: int,
        state: DraftState,
    ) -> tuple[DraftState, Calls]:
        decoder = self.decoder
        positions = state.read[:, None] + jnp.arange(drafts + 1)
        window = take_at(state.rows, positions)
        hidden, cache = decoder.read(params, bias, state.cache, window, positions)
        logits = decoder.logits(params, hidden)
        best, is_near = likeliest(logits), _is_near_tie(logits)
        is_right = (window[:, 1:] == best[:, :-1]) & ~is_near[:, :-1]
        run = jnp.cumprod(is_right & state.confident[:, None], axis=1, dtype=jnp.int32)
        accepted = jnp.sum(run, axis=1, dtype=jnp.int32)
        redone = take_at(is_near, accepted) & ~state.is_done
        record = Calls(jnp.where(state.confident, drafts, 0), accepted, redone)
        cache, settled, token = self._settle(
            params,
            bias,
            state._replace(cache=cache),
            record,
            take_at(best, accepted),
        )
        end = state.read + accepted + 1
        kept = (
            None if state.hidden is None else write_at(state.hidden, positions, hidden)
        )
        moved = state._replace(
            cache=cache,
            rows=write_at(state.rows, end[:, None], token[:, None]),
            read=jnp.minimum(end, state.stop),
            settled=settled,
            hidden=kept,
        )
        first = jnp.maximum(state.read - self.drafts + 1, 0)
        last = take_at(hidden, accepted)
        return self._draft(params, moved, last, first, 2 * self.drafts), record

    def _settle(
        self,
        params: optax.Params,
        bias: Float[Array, "L E"] | None,
        state: DraftState,
        record: Calls,
        token: Int[Array, "B"],
    ) -> tuple[VariableDict, Int[Array, "B"], Int[Array, "B"]]:
        """Decides near ties by reading one token at a time.

        Returns:
          The cache, how many tokens of each row were read one by one by now, and the
          tokens after the accepted ones.
        """
        end = state.read + record.accepted

        def is_open(carry: tuple[VariableDict, Array, Array]) -> Bool[Array, ""]:
            return jnp.any(record.redone & (carry[1] <= end))

        def read_one(
            carry: tuple[VariableDict, Array, Array],
        ) -> tuple[VariableDict, Array, Array]:
            cache, settled, _ = carry
            position = jnp.minimum(settled, end)[:, None]
            old = take_at(state.rows, position)
            hidden, cache = self.decoder.read(params, bias, cache, old, position)
            logits = self.decoder.logits(params, hidden[:, 0])
            return cache, position[:, 0] + 1, likeliest(logits)

        before = (state.cache, state.settled, token)
        cache, settled, decided = jax.lax.while_loop(is_open, read_one, before)
        return cache, settled, jnp.where(record.redone, decided, token)

    def _draft(
        self,
        params: optax.Params,
        state: DraftState,
        last: Float[Array, "B D"],
        first: Int[Array, "B"],
        width: int,
    ) -> DraftState:
        """Writes drafts after the newest token, if they are wanted.

        Args:
          params: of the model.
          state: with its newest token written.
          last: the hidden state that the newest token was predicted from.
          first: the first position with new input for sequential heads.
          width: number of positions from there on, of which the last may be unread.
        """
        if state.hidden is not None:
            return self._draft_deeper(params, state, state.hidden, first, width)
        apply = functools.partial(self.decoder.model.apply, with_params(params), last)

        def draft() -> Int[Array, "B K"]:
            logits = cast(Array, apply(method=LanguageModel.parallel_logits))
            return likeliest(logits[..., : self.decoder.model.loss.vocab_size]).T

        positions = state.read[:, None] + 1 + jnp.arange(self.drafts)
        if not is_adaptive(self.decoder.model.loss):
            return state._replace(rows=write_at(state.rows, positions, draft()))
        confident = cast(Array, apply(method=LanguageModel.is_confident))
        is_wanted = jnp.any(confident & ~state.is_done)
        nothing = jnp.zeros_like(positions)
        drafts = jax.lax.cond(is_wanted, draft, lambda: nothing)
        return state._replace(
            rows=write_at(state.rows, positions, drafts), confident=confident
        )

    def _draft_deeper(
        self,
        params: optax.Params,
        state: DraftState,
        hidden: Float[Array, "B C D"],
        first: Int[Array, "B"],
        width: int,
    ) -> DraftState:
        """Drafts depth by depth, each from the tokens of those before.

        Depth j at position t reads the token at t + j, so its keys and values of the
        last j - 1 positions were computed from drafts. They are computed again, like
        those of new positions.
        """
        cache, rows = state.cache, state.rows
        positions = first[:, None] + jnp.arange(width)
        stream = take_at(hidden, positions)
        for depth in range(1, self.drafts + 1):
            ahead = take_at(rows, positions + depth)
            out, changed = self.decoder.model.apply(
                {**with_params(params), "cache": cache},
                depth,
                stream,
                ahead,
                Batch(ahead, ahead, jnp.ones_like(ahead), positions),
                method=LanguageModel.look_deeper,
                mutable=["cache"],
            )
            stream, heard = cast(tuple[Array, Array], out)
            cache = changed["cache"]
            last = take_at(heard, state.read - 1 - first)
            draft = likeliest(self.decoder.logits(params, last))
            rows = write_at(rows, (state.read + depth)[:, None], draft[:, None])
        return state._replace(cache=cache, rows=rows)


@functools.partial(jax.jit, static_argnames=("model", "count"))
def speculate(
    model: LanguageModel,
    params: optax.Params,
    bias: Float[Array, "L E"] | None,
    prompts: Int[Array, "B S"],
    lengths: Int[Array, "B"],
    *,
    count: int,
) -> Speculated:
    """Continues each prompt by `count` tokens, those of greedy `generate`.

    Args:
      model: that was trained, with heads that look ahead.
      params: its parameters.
      bias: of the routers, from the loss state.
      prompts: one per row, left-aligned; tokens after `lengths` are ignored.
      lengths: lengths of the prompts, at least 1.
      count: number of tokens to generate.

    Raises:
      ValueError: the model has no heads to draft with.
    """
    speculator = Speculator.of(model, prompts.shape[1] + count)
    state = speculator.begin(params, bias, prompts, lengths, count)
    calls = jnp.zeros_like(lengths)
    # A call makes a token at least, so they all fit.
    nothing = jnp.zeros((len(lengths), count), jnp.int32)
    record = Calls(nothing, nothing, nothing.astype(bool))

    def is_open(carry: tuple[DraftState, Array, Calls]) -> Bool[Array, ""]:
        return ~jnp.all(carry[0].is_done)

    def step(carry: tuple[DraftState, Array, Calls]) -> tuple[DraftState, Array, Calls]:
        state, calls, record = carry
        counts = ~state.is_done
        state, new = speculator.call(params, bias, state)
        new = jax.tree.map(lambda x: jnp.where(counts, x, jnp.zeros_like(x)), new)
        position = calls[:, None]
        record = jax.tree.map(
            lambda all, x: write_at(all, position, x[:, None]), record, new
        )
        return state, calls + counts, record

    state, calls, record = jax.lax.while_loop(is_open, step, (state, calls, record))
    positions = lengths[:, None] + jnp.arange(count)
    return Speculated(take_at(state.rows, positions), calls, record)


def _is_near_tie(logits: Float[Array, "*n V"]) -> Bool[Array, "*n"]:
    """Returns where rounding could change which logit is the largest."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    bound = NEAR * jnp.maximum(jnp.abs(best), 1.0)
    return jnp.sum(logits > best - bound, axis=-1) > 1


def write_at(
    x: Shaped[Array, "B S *m"],
    positions: Int[Array, "B n"],
    new: Shaped[Array, "B n *m"],
) -> Shaped[Array, "B S *m"]:
    """Writes at each row's own positions; those past the end are dropped."""
    return x.at[jnp.arange(x.shape[0])[:, None], positions].set(new, mode="drop")

"""Samples of a batch of prompts as rows that a loss can read."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool

from trainer.data.text import end_of_text
from trainer.decode.decoder import Sampling, generate
from trainer.errors import TrainingError
from trainer.model.layers import Batch
from trainer.run.trained import Trained


class Samples(NamedTuple):
    """Prompts, each with what a model made of it.

    Attributes:
      batch: the rows, S tokens each.
      mask: 1 where the target was sampled, up to the first end of text and with it.
      texts: what was sampled, without the prompts.
    """

    batch: Batch
    mask: Bool[Array, "B S"]
    texts: list[str]


def sample_rows(
    trained: Trained,
    params: optax.Params,
    prompts: Sequence[str],
    key: Array,
    longest: int,
    count: int,
    sampling: Sampling,
) -> Samples:
    """Continues each prompt by `count` tokens or up to an end of text.

    Args:
      trained: the model, its tokenizer and routers.
      params: of the policy.
      prompts: one per row.
      key: random key of the sampling.
      longest: tokens of the longest prompt that there may be.
      count: number of tokens to sample.
      sampling: how to pick a token.

    Raises:
      TrainingError: a prompt has more tokens than `longest`.
    """
    eos = end_of_text(trained.tokenizer)
    encoded = [trained.encode(prompt) for prompt in prompts]
    lengths = np.array([len(tokens) for tokens in encoded], np.int32)
    if max(lengths) > longest:
        raise TrainingError(f"a prompt has {max(lengths)} tokens, more than {longest}")
    ids = np.full((len(prompts), longest + count), eos, np.int32)
    for row, tokens in zip(ids, encoded, strict=True):
        row[: len(tokens)] = tokens
    made = generate(
        trained.model,
        params,
        trained.bias,
        ids[:, :longest],
        lengths,
        key,
        count=count,
        sampling=sampling,
    )
    offsets = np.arange(ids.shape[1], dtype=np.int32) - lengths[:, None]
    is_made = (offsets >= 0) & (offsets < count)
    ids[is_made] = np.asarray(made).reshape(-1)
    is_end = is_made & (ids == eos)
    mask = is_made & (np.cumsum(is_end, axis=1) - is_end == 0)
    kept = [row[use].tolist() for row, use in zip(ids, mask, strict=True)]
    ones = np.ones_like(ids[:, 1:])
    rows = ids[:, :-1], ids[:, 1:], ones, np.cumsum(ones, axis=1, dtype=np.int32) - 1
    batch = Batch(*map(jnp.asarray, rows))
    texts = [trained.tokenizer.decode(tokens) for tokens in kept]
    return Samples(batch, jnp.asarray(mask[:, 1:]), texts)

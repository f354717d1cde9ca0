"""Log-probabilities and their gradients in float64, one token after the other."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


class Expected(NamedTuple):
    """What `token_log_probs` of given logits should return.

    Attributes:
      values: log-probabilities, entropies and log-normalisers, [3, B, S].
      of_logits: the gradient of `Σ cotangents · values`, like the logits.
      of_temperature: likewise.
    """

    values: Numbers
    of_logits: Numbers
    of_temperature: float


class OneToken(NamedTuple):
    """The same of one token; `of_tempered` is the gradient of `z / T`."""

    values: tuple[float, float, float]
    of_tempered: Numbers


def one_token(q: Numbers, target: int | None, cotangents: Numbers) -> OneToken:
    """Computes the values of one row of finite tempered logits.

    Args:
      q: the row, without impossible classes.
      target: where the target is in it; None if it is impossible.
      cotangents: of the three values.
    """
    largest = q.max()
    log_z = largest + np.log(np.exp(q - largest).sum())
    log_p = q - log_z
    p = np.exp(log_p)
    entropy = -(p * log_p).sum()
    of_log_prob, of_entropy, of_log_z = cotangents
    grad = (of_log_z - of_log_prob) * p - of_entropy * p * (log_p + entropy)
    if target is not None:
        grad[target] += of_log_prob
    log_prob = -np.inf if target is None else log_p[target]
    return OneToken((float(log_prob), float(entropy), float(log_z)), grad)


def log_probs_oracle(
    logits: Numbers,
    targets: NDArray[np.integer],
    active: NDArray[np.bool_],
    cotangents: Numbers,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    soft_cap: float | None = None,
) -> Expected:
    """Computes values and gradients; soft-cap first, then temperature."""
    values = np.zeros((3, *targets.shape))
    of_logits, of_temperature = np.zeros(logits.shape), 0.0
    for row, position in np.argwhere(active):
        raw = logits[row, position, :vocab_size].astype(np.float64)
        ids = np.flatnonzero(raw != -np.inf)
        slope = np.ones(len(ids))
        z = raw[ids]
        if soft_cap is not None:
            z = soft_cap * np.tanh(raw[ids] / soft_cap)
            slope = 1 - np.tanh(raw[ids] / soft_cap) ** 2
        found = np.flatnonzero(ids == targets[row, position])
        where = int(found[0]) if found.size else None
        token = one_token(z / temperature, where, cotangents[:, row, position])
        values[:, row, position] = token.values
        of_logits[row, position, ids] = token.of_tempered * slope / temperature
        of_temperature -= float((token.of_tempered * z).sum()) / temperature**2
    return Expected(values, of_logits, of_temperature)

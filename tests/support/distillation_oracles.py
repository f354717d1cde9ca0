"""Divergences from a teacher in float64, one token after another."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(
    row: Sequence[float], vocab_size: int, temperature: float, cap: float | None
) -> list[float]:
    """Of a row of logits, soft-capped, divided by T, without padded columns."""
    z = [float(x) for x in row[:vocab_size]]
    if cap is not None:
        z = [x if x == -math.inf else cap * math.tanh(x / cap) for x in z]
    z = [x / temperature for x in z]
    top = max(z)
    log_z = top + math.log(sum(math.exp(x - top) for x in z))
    return [x - log_z for x in z]


def kl(a: Sequence[float], b: Sequence[float]) -> float:
    """`Σ a·(log a − log b)` of logarithms; 0 where a is 0."""
    return sum(
        math.exp(x) * (x - y) for x, y in zip(a, b, strict=True) if math.exp(x) > 0
    )


def mixture(p: Sequence[float], q: Sequence[float], beta: float) -> list[float]:
    """`log((1 − β)·p + β·q)`."""
    return [
        float(np.logaddexp(x, y))
        for x, y in zip(
            (math.log(1 - beta) + x for x in p),
            (math.log(beta) + y for y in q),
            strict=True,
        )
    ]


def divergence(p: Sequence[float], q: Sequence[float], beta: float) -> float:
    """Of the student's p from the teacher's q, both as logarithms."""
    if beta == 0:
        return kl(q, p)
    if beta == 1:
        return kl(p, q)
    m = mixture(p, q, beta)
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def distillation(
    student: NDArray,
    teacher: NDArray,
    weights: NDArray,
    *,
    vocab_size: int,
    beta: float = 0.0,
    temperature: float = 1.0,
    soft_cap: float | None = None,
    teacher_soft_cap: float | None = None,
) -> float:
    """The mean of T²·D over the tokens of weight other than 0, from logits."""
    total, count = 0.0, 0.0
    for z, y, w in _tokens(student, teacher, weights):
        p = log_softmax(z, vocab_size, temperature, soft_cap)
        q = log_softmax(y, vocab_size, temperature, teacher_soft_cap)
        total += w * divergence(p, q, beta)
        count += w
    return temperature**2 * total / count if count else 0.0


def _tokens(*arrays: NDArray) -> list[Any]:
    """The tokens of arrays [B, S, ...] of which the last is the weights."""
    rows, length = arrays[-1].shape
    return [
        (*(x[b, t] for x in arrays[:-1]), float(arrays[-1][b, t]))
        for b in range(rows)
        for t in range(length)
        if arrays[-1][b, t] != 0
    ]


def top_k_token(p: Sequence[float], q: Sequence[float], *, tail: bool) -> float:
    """Of one token, from log-probabilities of k classes; −inf in q leaves one out."""
    pairs = [(x, y) for x, y in zip(p, q, strict=True) if y != -math.inf]
    sum_p = sum(math.exp(x) for x, _ in pairs)
    sum_q = sum(math.exp(y) for _, y in pairs)
    if not pairs:
        return 0.0
    if not tail:
        norm = math.log(sum_p) - math.log(sum_q)
        return sum(math.exp(y) / sum_q * (y - x + norm) for x, y in pairs)
    known = sum(math.exp(y) * (y - x) for x, y in pairs)
    rest_p, rest_q = 1 - sum_p, 1 - sum_q
    return known + (rest_q * math.log(rest_q / rest_p) if rest_q > 0 else 0.0)


def top_k_distillation(
    student: NDArray,
    ids: NDArray,
    log_probs: NDArray,
    weights: NDArray,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    tail: bool = True,
    soft_cap: float | None = None,
) -> float:
    """The mean over tokens; ids outside the vocabulary are left out."""
    total, count = 0.0, 0.0
    for z, chosen, q, w in _tokens(student, ids, log_probs, weights):
        p = log_softmax(z, vocab_size, temperature, soft_cap)
        kept = [
            (p[i], float(y))
            for i, y in zip(chosen, q, strict=True)
            if 0 <= i < vocab_size
        ]
        total += w * top_k_token([x for x, _ in kept], [y for _, y in kept], tail=tail)
        count += w
    return temperature**2 * total / count if count else 0.0

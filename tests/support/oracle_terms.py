"""Token-level terms in float64 NumPy: plain loops that a reader can check by eye.

`z` is always one token's logits `[V]`; −inf marks a vocabulary entry of probability 0.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

RUN_CAP = 10


def log_sum_exp(z: Floats) -> float:
    """log Σ_v e^{z_v}."""
    top = float(np.max(z))
    return top + math.log(float(np.sum(np.exp(z - top))))


def softmax(z: Floats) -> Floats:
    """p_v = e^{z_v} / Σ_u e^{z_u}."""
    top = float(np.max(z))
    return np.exp(z - top) / np.sum(np.exp(z - top))


def nll(z: Floats, y: int) -> float:
    """−log p_y."""
    return log_sum_exp(z) - float(z[y])


def unlikelihood(z: Floats, c: int) -> float:
    """−log(1 − p_c), where 1 − p_c is the mass of the other classes."""
    return log_sum_exp(z) - log_sum_exp(np.delete(z, c))


def entropy(z: Floats) -> float:
    """−Σ_v p_v log p_v."""
    return -sum(float(p) * math.log(p) for p in softmax(z) if p > 0)


def smoothed_cross_entropy(
    z: Floats, y: int, smoothing: float, temperature: float = 1.0
) -> float:
    """(1−ε)·nll + ε·(mean nll of the other classes that are not −inf)."""
    scaled = z / temperature
    loss = (1 - smoothing) * nll(scaled, y)
    if smoothing:
        others = [v for v in range(len(z)) if v != y and np.isfinite(z[v])]
        loss += smoothing * sum(nll(scaled, v) for v in others) / len(others)
    return loss


def focal(z: Floats, y: int, alpha: float | Floats, gamma: float) -> float:
    """α·(1−p_y)^γ·nll."""
    scale = float(alpha) if np.ndim(alpha) == 0 else float(np.asarray(alpha)[y])
    return scale * math.exp(-unlikelihood(z, y)) ** gamma * nll(z, y)


def soft_cap(z: Floats, cap: float | None) -> Floats:
    """cap·tanh(z/cap); a masked entry, −inf, stays masked."""
    return z if cap is None else np.where(np.isneginf(z), z, cap * np.tanh(z / cap))


def weighted_mean(values: Floats, weights: Floats) -> float:
    """Σ w·x / Σ w over the positions of non-zero weight; 0 where there are none."""
    total = float(np.sum(weights))
    if total == 0:
        return 0.0
    kept = weights != 0
    return float(np.sum(values[kept] * weights[kept])) / total


def token_values(
    logits: Floats, targets: Ints, weights: Floats, term: Callable[[Floats, int], float]
) -> Floats:
    """term(z, y) at every counted position, 0 elsewhere."""
    values = np.zeros(targets.shape)
    for b, t in counted(weights):
        values[b, t] = term(logits[b, t], int(targets[b, t]))
    return values


def counted(weights: Floats) -> Iterable[tuple[int, int]]:
    """The (row, position) pairs whose weight is not 0."""
    for b in range(weights.shape[0]):
        for t in range(weights.shape[1]):
            if weights[b, t] != 0:
                yield b, t


# Weights and segments -----------------------------------------------------------


def pad_weights(targets: Ints, pad: int | None, eos: int | None) -> Floats:
    """The attention weights when no mask is given."""
    weights = np.ones(targets.shape)
    if pad is None:
        return weights
    for b in range(targets.shape[0]):
        if pad != eos:
            weights[b, targets[b] == pad] = 0
            continue
        start = targets.shape[1]
        while start > 0 and targets[b, start - 1] == pad:
            start -= 1
        # Padding alone ends nothing.
        weights[b, start + (start > 0) :] = 0
    return weights


def attention_weights(
    targets: Ints,
    attention_mask: Floats | None,
    segments: Ints | None,
    pad: int | None,
    eos: int | None,
) -> Floats:
    """What the caller says counts, before the targets themselves are looked at."""
    if attention_mask is None:
        weights = pad_weights(targets, pad, eos)
    else:
        weights = attention_mask.astype(np.float64)
    return weights if segments is None else np.where(segments == 0, 0.0, weights)


def without_boundaries(segments: Ints) -> Ints:
    """Segment 0 for targets that are predicted from the segment before."""
    kept = segments.copy()
    for b in range(segments.shape[0]):
        for t in range(1, segments.shape[1]):
            if segments[b, t] != segments[b, t - 1]:
                kept[b, t] = 0
    return kept


def valid_targets(targets: Ints, vocab: int, ignore_index: int) -> Bools:
    """[y ≠ ignore_index]·[0 ≤ y < V]."""
    return (targets != ignore_index) & (targets >= 0) & (targets < vocab)


def position_in_segment(segment: Ints, t: int) -> int:
    """How many positions of t's own segment come directly before t."""
    start = t
    while start > 0 and segment[start - 1] == segment[t]:
        start -= 1
    return t - start


def shifted_weights(weights: Floats, segments: Ints, j: int) -> Floats:
    """[B, S−j]: w[t+j] where t and t+j share a segment, else 0."""
    rows, length = weights.shape
    shifted = np.zeros((rows, length - j))
    for b in range(rows):
        for t in range(length - j):
            if segments[b, t] == segments[b, t + j]:
                shifted[b, t] = weights[b, t + j]
    return shifted


# Penalties on the targets -------------------------------------------------------


def window(y: Ints, w: Floats, segment: Ints, start: int, n: int) -> tuple | None:
    """The n targets from `start`, or None where one is masked or elsewhere."""
    if start < 0 or start + n > len(y):
        return None
    places = range(start, start + n)
    if any(w[i] == 0 or segment[i] != segment[start] for i in places):
        return None
    return tuple(int(y[i]) for i in places)


def ngram_targets(targets: Ints, weights: Floats, segments: Ints, n: int) -> float:
    """Σ_rows Σ_distinct c(c−1)/2 / (number of windows in the batch)."""
    pairs, windows = 0.0, 0
    for y, w, segment in zip(targets, weights, segments, strict=True):
        counts: Counter[tuple] = Counter()
        for start in range(len(y)):
            found = window(y, w, segment, start, n)
            if found is not None:
                counts[(int(segment[start]), *found)] += 1
        windows += sum(counts.values())
        pairs += sum(c * (c - 1) / 2 for c in counts.values())
    return pairs / windows if windows else 0.0


def immediate_targets(targets: Ints, weights: Floats, segments: Ints) -> float:
    """Mean over rows of (longest run − 1)²."""
    total = 0.0
    for y, w, segment in zip(targets, weights, segments, strict=True):
        run, longest = 1, 1
        for t in range(len(y)):
            if w[t] == 0:
                continue
            same = t > 0 and y[t] == y[t - 1] and segment[t] == segment[t - 1]
            run = run + 1 if same else 1
            longest = max(longest, run)
        total += (longest - 1) ** 2
    return total / len(targets)


def early_eos_targets(
    targets: Ints, weights: Floats, segments: Ints, eos: int, minimum: int
) -> float:
    """Share of tokens that are an EOS too early in their segment."""
    early = np.zeros(targets.shape)
    for b, t in counted(weights):
        place = position_in_segment(segments[b], t)
        early[b, t] = targets[b, t] == eos and place < minimum
    return weighted_mean(early, weights)


# Penalties on the predictions ---------------------------------------------------


def ngram_candidates(
    y: Ints, w: Floats, segment: Ints, t: int, n: int, most: int
) -> list[int]:
    """What followed the latest `most` earlier occurrences of t's context."""
    context = window(y, w, segment, t - n + 1, n - 1)
    if context is None or (n > 1 and segment[t - 1] != segment[t]):
        return []
    found: list[int] = []
    for j in range(t - 1, -1, -1):
        if w[j] == 0 or segment[j] != segment[t] or len(found) == most:
            continue
        if n > 1 and j > 0 and segment[j - 1] != segment[j]:
            continue
        if window(y, w, segment, j - n + 1, n - 1) == context:
            found.append(int(y[j]))
    return found


def ngram_predictions(
    logits: Floats, targets: Ints, weights: Floats, segments: Ints, n: int, most: int
) -> float:
    """Mean of Σ_j [y_j ≠ y_t]·u(y_j) over the matches j of t's context."""
    terms = np.zeros(targets.shape)
    for b, t in counted(weights):
        for c in ngram_candidates(targets[b], weights[b], segments[b], t, n, most):
            if c != targets[b, t]:
                terms[b, t] += unlikelihood(logits[b, t], c)
    return weighted_mean(terms, weights)


def run_before(y: Ints, w: Floats, segment: Ints, t: int) -> int:
    """Length of the run of equal counted targets that ends at t−1."""
    run, i = 0, t - 1
    while i >= 0 and w[i] != 0 and segment[i] == segment[t] and y[i] == y[t - 1]:
        run, i = run + 1, i - 1
    return min(run, RUN_CAP)


def immediate_predictions(
    logits: Floats, targets: Ints, weights: Floats, segments: Ints
) -> float:
    """Mean of (2r−1)·u(y_{t−1}) where the run of r stops at t."""
    terms = np.zeros(targets.shape)
    for b, t in counted(weights):
        run = run_before(targets[b], weights[b], segments[b], t)
        if run and targets[b, t] != targets[b, t - 1]:
            last = int(targets[b, t - 1])
            terms[b, t] = (2 * run - 1) * unlikelihood(logits[b, t], last)
    return weighted_mean(terms, weights)


def early_eos_predictions(
    logits: Floats,
    targets: Ints,
    weights: Floats,
    segments: Ints,
    eos: int,
    minimum: int,
) -> float:
    """Mean of u(eos) over early positions whose target is another token."""
    terms = np.zeros(targets.shape)
    for b, t in counted(weights):
        place = position_in_segment(segments[b], t)
        if place < minimum and targets[b, t] != eos:
            terms[b, t] = unlikelihood(logits[b, t], eos)
    return weighted_mean(terms, weights)


def token_unlikelihood(
    logits: Floats, targets: Ints, weights: Floats, segments: Ints
) -> float:
    """Mean of Σ u(c) over the distinct earlier targets c ≠ y_t of the segment."""
    terms = np.zeros(targets.shape)
    for b, t in counted(weights):
        earlier = {
            int(targets[b, i])
            for i in range(t)
            if weights[b, i] != 0 and segments[b, i] == segments[b, t]
        }
        for c in earlier - {int(targets[b, t])}:
            terms[b, t] += unlikelihood(logits[b, t], c)
    return weighted_mean(terms, weights)


def contrastive_token(
    logits: Floats, targets: Ints, weights: Floats, segments: Ints, size: int
) -> float:
    """Mean of log(1 + Σ e^{z_c − z_y}) over the distinct c ≠ y of the last `size`."""
    terms = np.zeros(targets.shape)
    for b, t in counted(weights):
        y, z = int(targets[b, t]), logits[b, t]
        recent = {
            int(targets[b, i])
            for i in range(max(t - size, 0), t)
            if weights[b, i] != 0 and segments[b, i] == segments[b, t]
        }
        gaps = [0.0, *(float(z[c] - z[y]) for c in sorted(recent - {y}))]
        terms[b, t] = log_sum_exp(np.array(gaps))
    return weighted_mean(terms, weights)


def token_diversity(logits: Floats, weights: Floats) -> float:
    """Mean of 1 − H/log V."""
    terms = np.zeros(weights.shape)
    for b, t in counted(weights):
        terms[b, t] = 1 - entropy(logits[b, t]) / math.log(logits.shape[-1])
    return weighted_mean(terms, weights)


# Functions of their own ---------------------------------------------------------


def sequence_unlikelihood(
    logits: Floats, tokens: Ints, weights: Floats, n: int
) -> Floats:
    """u(token_t) at every t that ends an n-gram already seen in the row: [B, S]."""
    terms = np.zeros(tokens.shape)
    segments = np.ones(tokens.shape, np.int64)
    for b, t in counted(weights):
        last = window(tokens[b], weights[b], segments[b], t - n + 1, n)
        earlier = {
            window(tokens[b], weights[b], segments[b], start, n)
            for start in range(t - n + 1)
        }
        if last is not None and last in earlier:
            terms[b, t] = unlikelihood(logits[b, t], int(tokens[b, t]))
    return terms


def repetition_decay(
    logits: Floats, targets: Ints, weights: Floats, span: int, decay: float = 0.5
) -> Floats:
    """−log(1 − |p_t(y_t) − λ·p_{t−ℓ}(y_t)|) for t ≥ ℓ, 0 before: [B, S]."""
    terms = np.zeros(targets.shape)
    for b, t in counted(weights):
        if t >= span:
            y = int(targets[b, t])
            now, before = softmax(logits[b, t])[y], softmax(logits[b, t - span])[y]
            terms[b, t] = -math.log(1 - abs(now - decay * before))
    return terms

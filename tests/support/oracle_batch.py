"""Batch terms in float64 NumPy: mixture of experts, contrastive, and the rest."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from support.oracle_terms import Floats, Ints, log_sum_exp, nll, softmax, window

COUNT_EPSILON = 1e-6
COSINE_EPSILON = 1e-8


def unbiased_std(values: Floats) -> float:
    """√(Σ (x − mean)² / (n − 1))."""
    mean = float(np.sum(values)) / len(values)
    return math.sqrt(float(np.sum((values - mean) ** 2)) / (len(values) - 1))


# Experts: `gates` [L, N, E], `indices` [L, N, k], `tokens` the counted n. --------


def by_layer(values: NDArray, batch_shape: tuple[int, ...]) -> NDArray:
    """[N,·], [B,S,·] or either with leading layers, as [L, N, ·]."""
    if values.ndim == 4 or (values.ndim == 3 and values.shape[:2] != batch_shape):
        return values.reshape(values.shape[0], -1, values.shape[-1])
    return values.reshape(1, -1, values.shape[-1])


def expert_load(indices: Ints, tokens: list[int], experts: int) -> Floats:
    """Assignments per expert, [L, E]."""
    load = np.zeros((indices.shape[0], experts))
    for layer in range(indices.shape[0]):
        for n in tokens:
            for e in indices[layer, n]:
                load[layer, int(e)] += 1
    return load


def router_mass(gates: Floats, tokens: list[int]) -> Floats:
    """Σ over the tokens of the router's probabilities, [L, E]."""
    mass = np.zeros((gates.shape[0], gates.shape[2]))
    for layer in range(gates.shape[0]):
        for n in tokens:
            mass[layer] += softmax(gates[layer, n])
    return mass


def gradient_balance(
    counts: Floats, total: float, weight: float
) -> tuple[float, Floats, float]:
    """(term, ratio, cv) from the moving averages after their update."""
    experts = len(counts)
    shift = -weight * (counts - total / experts) / total if total else 0 * counts
    ratio = counts / (total / experts + COUNT_EPSILON)
    mean = float(np.sum(ratio)) / experts
    cv = unbiased_std(ratio) / (mean + COUNT_EPSILON)
    return weight * float(np.sum(shift**2)) / experts, ratio, cv


def max_violation(load: Floats) -> float:
    """max load / mean load − 1, of the load averaged over layers."""
    mean = load.mean(axis=0)
    return float(mean.max() / mean.mean()) - 1 if mean.any() else 0.0


def next_bias(bias: Floats, load: Floats, rate: float) -> Floats:
    """b + u·sign(mean load − load), then its mean taken off."""
    total = load.sum(axis=0)
    moved = bias + rate * np.sign(total.mean() - total)
    return moved - moved.mean()


def cutoff_histogram(
    scores: Floats, bias: Floats, k: int, tokens: list[int], bins: int
) -> Floats:
    """How many tokens would choose each expert from which bias on, [E, bins]."""
    low, high = float(bias.min()) - 1, float(bias.max()) + 1
    counts = np.zeros((len(bias), bins))
    for n in tokens:
        cutoff = sorted(scores[n] + bias, reverse=True)[k]
        for e in range(len(bias)):
            place = (cutoff - scores[n, e] - low) * bins / (high - low)
            counts[e, min(max(math.floor(place), 0), bins - 1)] += 1
    return counts


def quantile(counts: Floats, share: Fraction, low: float, high: float) -> float:
    """What `share` of a histogram over [low, high] lies below, linear in a bin."""
    wanted, below = share * int(counts.sum()), 0
    for place, count in enumerate(map(int, counts)):
        if below + count >= wanted:
            inside = float((wanted - below) / count)
            return low + (place + inside) * (high - low) / len(counts)
        below += count
    raise AssertionError("the histogram is empty")


def next_quantile_bias(bias: Floats, counts: Floats, k: int, momentum: float) -> Floats:
    """m·b + (1 − m)·(q − mean q), with q the k/E quantiles of the histograms."""
    if not counts.any():
        return bias
    low, high = float(bias.min()) - 1, float(bias.max()) + 1
    share = Fraction(k, len(bias))
    found = np.array([quantile(row, share, low, high) for row in counts])
    return momentum * bias + (1 - momentum) * (found - found.mean())


def auxiliary_load_balancing(gates: Floats, load: Floats, tokens: list[int]) -> float:
    """min(10, E·Σ_e P_e·c_e/(N·k)²), averaged over layers."""
    if not tokens:
        return 0.0
    mass = router_mass(gates, tokens)
    experts = gates.shape[2]
    values = []
    for layer in range(gates.shape[0]):
        assignments = float(load[layer].sum())
        dot = sum(float(mass[layer, e] * load[layer, e]) for e in range(experts))
        values.append(min(10.0, experts * dot / assignments**2))
    return sum(values) / len(values)


def auxiliary_router_z(gates: Floats, tokens: list[int]) -> float:
    """min(100, mean(logsumexp(clip(g, −10, 10))²)), averaged over layers."""
    if not tokens:
        return 0.0
    values = []
    for layer in gates:
        squares = [log_sum_exp(np.clip(layer[n], -10, 10)) ** 2 for n in tokens]
        values.append(min(100.0, sum(squares) / len(squares)))
    return sum(values) / len(values)


def similarity(a: Floats, b: Floats, metric: str) -> float:
    """Of two experts' outputs for one token (`l2` takes the mean distance later)."""
    if metric == "cosine":
        norm_a = max(float(np.linalg.norm(a)), COSINE_EPSILON)
        norm_b = max(float(np.linalg.norm(b)), COSINE_EPSILON)
        return float(a @ b) / (norm_a * norm_b)
    return float(np.linalg.norm(a - b)) if metric == "l2" else float(a @ b)


def expert_diversity(
    outputs: Floats, tokens: list[int], metric: str = "cosine"
) -> float:
    """Mean over expert pairs of the token-mean similarity of `outputs` [E, N, ·]."""
    experts = outputs.shape[0]
    pairs = [(i, j) for i in range(experts) for j in range(i + 1, experts)]
    if not tokens or not pairs:
        return 0.0
    total = 0.0
    for i, j in pairs:
        each = [similarity(outputs[i, n], outputs[j, n], metric) for n in tokens]
        mean = sum(each) / len(each)
        total += 1 / (1 + mean) if metric == "l2" else mean
    return total / len(pairs)


# Contrastive --------------------------------------------------------------------


def normalized(embeddings: Floats) -> Floats:
    """Rows of length 1."""
    return embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)


def infonce(embeddings: Floats, labels: Ints, temperature: float = 0.07) -> float:
    """Supervised contrastive loss: mean over anchors that have a positive."""
    e = normalized(embeddings)
    losses = []
    for i in range(len(e)):
        others = [j for j in range(len(e)) if j != i]
        scores = np.array([float(e[i] @ e[j]) / temperature for j in others])
        at = [k for k, j in enumerate(others) if labels[j] == labels[i]]
        if at:
            losses.append(sum(nll(scores, k) for k in at) / len(at))
    return sum(losses) / len(losses) if losses else 0.0


def margin_contrastive(
    embeddings: Floats,
    positives: list[tuple[int, int]],
    negatives: list[tuple[int, int]],
    margin: float,
    normalize: bool = True,
) -> float:
    """(mean d₊² + mean max(0, margin − d₋)²)/2."""
    e = normalized(embeddings) if normalize else embeddings
    near = [float(np.linalg.norm(e[i] - e[j])) ** 2 for i, j in positives]
    gaps = [margin - float(np.linalg.norm(e[i] - e[j])) for i, j in negatives]
    far = [max(0.0, gap) ** 2 for gap in gaps]
    mean_near = sum(near) / len(near) if near else 0.0
    mean_far = sum(far) / len(far) if far else 0.0
    return (mean_near + mean_far) / 2


def label_pairs(labels: Ints) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All pairs i < j, split by whether the labels agree."""
    pairs = [(i, j) for i in range(len(labels)) for j in range(i + 1, len(labels))]
    same = [(i, j) for i, j in pairs if labels[i] == labels[j]]
    return same, [pair for pair in pairs if pair not in same]


def triplet(embeddings: Floats, labels: Ints, margin: float) -> float:
    """Batch-hard: farthest positive against nearest negative of each anchor."""
    e = normalized(embeddings)
    losses = []
    for i in range(len(e)):
        far = [
            float(np.linalg.norm(e[i] - e[j]))
            for j in range(len(e))
            if j != i and labels[j] == labels[i]
        ]
        near = [
            float(np.linalg.norm(e[i] - e[j]))
            for j in range(len(e))
            if labels[j] != labels[i]
        ]
        if far and near:
            losses.append(max(0.0, margin + max(far) - min(near)))
    return sum(losses) / len(losses) if losses else 0.0


def simctg(
    hidden: Floats, weights: Floats, segments: Ints, margin: float = 0.5
) -> float:
    """Mean over counted i ≠ j of one segment of max(0, ρ − 1 + cos(h_i, h_j))."""
    total, pairs = 0.0, 0
    for b in range(hidden.shape[0]):
        kept = [t for t in range(hidden.shape[1]) if weights[b, t] != 0]
        for i in kept:
            for j in kept:
                if i != j and segments[b, i] == segments[b, j]:
                    cosine = similarity(hidden[b, i], hidden[b, j], "cosine")
                    total += max(0.0, margin - 1 + cosine)
                    pairs += 1
    return total / pairs if pairs else 0.0


# Others -------------------------------------------------------------------------


def consistency(
    original: Floats, augmented: Floats, kind: str, temperature: float
) -> Floats:
    """One value a row of `[N, V]`; `ce` knows no temperature."""
    rows = []
    for p_logits, q_logits in zip(original, augmented, strict=True):
        p, q = softmax(p_logits / temperature), softmax(q_logits / temperature)
        if kind == "mse":
            rows.append(float(np.sum((p - q) ** 2)) / len(p))
        elif kind == "kl":
            rows.append(float(np.sum(q * (np.log(q) - np.log(p)))))
        else:
            rows.append(nll(q_logits, int(np.argmax(p_logits))))
    return np.array(rows)


def weigh_losses(losses: Floats, log_weights: Floats) -> tuple[float, Floats]:
    """(Σ w·L, w) with w = softmax(log_weights)."""
    weights = softmax(log_weights)
    return float(np.sum(weights * losses)), weights


def homoscedastic(losses: Floats, log_variances: Floats) -> float:
    """Σ e^{−s}·L + s/2."""
    return float(np.sum(np.exp(-log_variances) * losses + log_variances / 2))


def mean_cross_entropy(logits: Floats, labels: Ints, ignore_index: int = -100) -> float:
    """Mean nll over every position whose label is not `ignore_index`."""
    flat, ids = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    losses = [
        nll(z, int(y)) for z, y in zip(flat, ids, strict=True) if y != ignore_index
    ]
    return sum(losses) / len(losses) if losses else 0.0


def perplexity(logits: Floats, labels: Ints) -> float:
    """exp(mean nll)."""
    return math.exp(mean_cross_entropy(logits, labels))


def row_scores(row: Ints, eos: int, pad: int, n: int) -> tuple[float, float, float]:
    """(repetition, EOS misuse, diversity) of one row without its padding."""
    ones, segment = np.ones(len(row)), np.ones(len(row), np.int64)
    windows = [window(row, ones, segment, i, n) for i in range(len(row) - n + 1)]
    grams = Counter(gram for gram in windows if gram is not None and pad not in gram)
    total = sum(grams.values())
    repetition = 1 - len(grams) / total if total else 0.0
    count = int(np.sum(row == eos))
    misuse = 0.0
    if count > 1:
        misuse = count / len(row)
    elif count == 1 and row[-1] != eos:
        misuse = 0.5 / len(row)
    plain = [int(y) for y in row if y not in (eos, pad)]
    return repetition, misuse, len(set(plain)) / len(plain) if plain else 0.0


def anti_repetition(
    logits: Floats,
    labels: Ints,
    attention_mask: Ints | None,
    eos: int,
    pad: int,
    n: int,
    weights: tuple[float, float, float] = (0.1, 0.05, 0.05),
) -> dict[str, float]:
    """Base CE plus the three scores, each the mean over rows."""
    rows, length = labels.shape
    lengths = [length] * rows
    if attention_mask is not None:
        lengths = [int(row.sum()) for row in attention_mask]
    scores = [
        row_scores(row[:kept], eos, pad, n)
        for row, kept in zip(labels, lengths, strict=True)
    ]
    repetition, misuse, diversity = (float(x) for x in np.mean(scores, axis=0))
    base = mean_cross_entropy(logits, labels)
    total = (
        base + weights[0] * repetition + weights[1] * misuse - weights[2] * diversity
    )
    return {
        "loss": total,
        "total_loss": total,
        "base_loss": base,
        "repetition_penalty": repetition,
        "eos_penalty": misuse,
        "diversity_bonus": diversity,
    }

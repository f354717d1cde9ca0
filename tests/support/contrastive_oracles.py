"""Contrastive losses in float64, one pair after another."""

import math

import numpy as np
from numpy.typing import NDArray

Pairs = list[tuple[int, int]]


def rows_of(x: NDArray, normalize: bool = True) -> list[NDArray]:
    rows = [row.astype(float) for row in x]
    norms = [float(np.linalg.norm(row)) for row in rows]
    return [r / n if normalize and n else r for r, n in zip(rows, norms, strict=True)]


def distance(a: NDArray, b: NDArray) -> float:
    return float(np.linalg.norm(a - b))


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else 0.0


def split_pairs(labels: NDArray) -> tuple[Pairs, Pairs]:
    n = len(labels)
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    same = [(i, j) for i, j in pairs if labels[i] == labels[j]]
    return same, [pair for pair in pairs if pair not in same]


def margin_oracle(
    x: NDArray, positive: Pairs, negative: Pairs, margin: float, normalize: bool
) -> float:
    z = rows_of(x, normalize)
    pull = [distance(z[i], z[j]) ** 2 for i, j in positive]
    push = [max(0.0, margin - distance(z[i], z[j])) ** 2 for i, j in negative]
    return (mean(pull) + mean(push)) / 2


def triplet_oracle(
    x: NDArray, labels: NDArray, margin: float, normalize: bool
) -> float:
    z, n, costs = rows_of(x, normalize), len(x), []
    for i in range(n):
        far = [
            distance(z[i], z[j]) for j in range(n) if j != i and labels[j] == labels[i]
        ]
        near = [distance(z[i], z[j]) for j in range(n) if labels[j] != labels[i]]
        if far and near:
            costs.append(max(0.0, margin + max(far) - min(near)))
    return mean(costs)


def infonce_oracle(
    x: NDArray,
    positive: Pairs,
    negative: Pairs | None,
    temperature: float,
    normalize: bool,
) -> float:
    z, n = rows_of(x, normalize), len(x)

    def named(pairs: Pairs, i: int) -> set[int]:
        return {b for a, b in pairs if a == i} | {a for a, b in pairs if b == i}

    costs = []
    for i in range(n):
        mine = named(positive, i)
        others = set(range(n)) - {i}
        if negative is not None:
            others = mine | named(negative, i)
        total = sum(math.exp(float(z[i] @ z[j]) / temperature) for j in others)
        if mine:
            logs = [float(z[i] @ z[j]) / temperature - math.log(total) for j in mine]
            costs.append(-mean(logs))
    return mean(costs)

"""Policy and preference losses in float64, one token and one pair after another."""

import math
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

MEANS_OF_ROWS = ("grpo", "dr_grpo", "luspo", "sapo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def sigma(x: float) -> float:
    """The logistic function."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigma(x: float) -> float:
    """Its logarithm."""
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


class PolicyOracle:
    """The policy loss of a batch as loops over rows and tokens.

    Attributes:
      x: arrays `log_probs`, `advantages`, `mask` and, if given, `old_log_probs`,
        `ref_log_probs`, `sampler_weights` and `entropy`, by name.
      options: the keyword arguments.
    """

    def __init__(self, x: Mapping[str, NDArray], **options: Any) -> None:
        self.x, self.options = x, options
        self.kind = options.get("kind", "grpo")
        self.rows, self.length = x["log_probs"].shape

    def option(self, name: str, default: Any) -> Any:
        value = self.options.get(name)
        return default if value is None else value

    def at(self, name: str, b: int, t: int, default: float) -> float:
        return float(self.x[name][b, t]) if name in self.x else default

    def weight(self, b: int, t: int) -> float:
        return float(self.x["mask"][b, t])

    def tokens(self, b: int) -> list[int]:
        return [t for t in range(self.length) if self.weight(b, t) != 0]

    def advantage(self, b: int, t: int) -> float:
        given = self.x["advantages"]
        return float(given[b] if given.ndim == 1 else given[b, t])

    def log_ratio(self, b: int, t: int) -> float:
        own = self.at("log_probs", b, t, 0.0)
        return own - self.at("old_log_probs", b, t, own)

    def ratio(self, b: int, t: int) -> float:
        own = "sequence" if self.kind == "luspo" else "token"
        if self.option("ratio_level", own) == "token":
            return math.exp(self.log_ratio(b, t))
        tokens = self.tokens(b)
        total = sum(self.weight(b, t) * self.log_ratio(b, t) for t in tokens)
        return math.exp(total / sum(self.weight(b, t) for t in tokens))

    def vespo_weight(self, b: int, t: int) -> float:
        total = 0.0
        for i in self.tokens(b):
            log_r = clip(self.log_ratio(b, i), -20, 20)
            sampler = self.at("sampler_weights", b, i, 1.0)
            total += self.weight(b, i) * (log_r + math.log(sampler))
        log_w = clip(total, math.log(1e-8), 20)
        k, scale = (2, 3) if self.advantage(b, t) >= 0 else (3, 2)
        return math.exp(scale + k * log_w - scale * math.exp(log_w))

    def policy(self, b: int, t: int) -> tuple[float, bool]:
        """The part of the advantages, and whether a bound replaced the ratio."""
        a, r = self.advantage(b, t), self.ratio(b, t)
        log_p = self.at("log_probs", b, t, 0.0)
        if self.kind == "vespo":
            return -self.vespo_weight(b, t) * a * log_p, False
        sampler = self.at("sampler_weights", b, t, 1.0)
        if self.kind == "cispo":
            cap = self.option("clip_high", 5.0)
            return -sampler * min(r, cap) * a * log_p, r > cap
        if self.kind == "sapo":
            first, second = self.option("sapo_temperatures", (1.0, 1.05))
            tau = first if a > 0 else second
            return -sampler * 4 / tau * sigma(tau * (r - 1)) * a, False
        low, high = self.option("clip_low", 0.2), self.option("clip_high", 0.2)
        capped = min(r, self.option("ratio_cap", math.inf))
        best = min(capped * a, clip(r, 1 - low, 1 + high) * a)
        return -sampler * best, best != r * a

    def kl(self, b: int, t: int) -> float:
        d = self.at("ref_log_probs", b, t, 0.0) - self.at("log_probs", b, t, 0.0)
        estimators = {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - d - 1}
        value = estimators[self.option("kl_estimator", "k3")]
        if self.options.get("kl_importance_weighting"):
            value *= self.ratio(b, t)
        return value

    def loss_at(self, b: int, t: int) -> float:
        value = self.policy(b, t)[0]
        if "ref_log_probs" in self.x:
            value += self.option("kl_weight", 0.0) * self.kl(b, t)
        entropy = self.at("entropy", b, t, 0.0)
        return value - self.option("entropy_weight", 0.0) * entropy

    def weight_of_row(self, b: int) -> float:
        return sum(self.weight(b, t) for t in self.tokens(b))

    def mean_of_tokens(self, value: Any) -> float:
        total, count = 0.0, 0.0
        for b in range(self.rows):
            for t in self.tokens(b):
                total += self.weight(b, t) * value(b, t)
            count += self.weight_of_row(b)
        count = self.option("num_tokens", count)
        return total / count if count else 0.0

    def loss(self) -> float:
        if self.kind not in MEANS_OF_ROWS:
            return self.mean_of_tokens(self.loss_at)
        total = 0.0
        for b in range(self.rows):
            tokens = self.tokens(b)
            if not tokens:
                continue
            row = sum(self.weight(b, t) * self.loss_at(b, t) for t in tokens)
            if self.kind == "dr_grpo":
                row /= self.options["max_length"]
            elif self.kind in ("grpo", "sapo"):
                row /= self.weight_of_row(b)
            total += row
        return total / self.option("num_rows", self.rows)

    def aux(self) -> dict[str, float]:
        values = {
            "policy_loss": lambda b, t: self.policy(b, t)[0],
            "clip_fraction": lambda b, t: float(self.policy(b, t)[1]),
            "mean_ratio": self.ratio,
        }
        if "ref_log_probs" in self.x:
            values["kl"] = self.kl
        if "entropy" in self.x:
            values["entropy"] = lambda b, t: self.at("entropy", b, t, 0.0)
        return {name: self.mean_of_tokens(value) for name, value in values.items()}


def group_advantages(rewards: NDArray, size: int, scale: bool, eps: float) -> list:
    result = []
    for start in range(0, len(rewards), size):
        group = [float(x) for x in rewards[start : start + size]]
        mean = sum(group) / size
        variance = sum((x - mean) ** 2 for x in group) / (size - 1)
        divisor = math.sqrt(variance) + eps if scale else 1.0
        result += [(x - mean) / divisor for x in group]
    return result


def sampler_weights(
    log_probs: NDArray, sampler: NDArray, mask: NDArray, cap: float, level: str
) -> list[list[float]]:
    result = []
    for own, other, kept in zip(log_probs, sampler, mask, strict=True):
        differences = [
            float(a) - float(b) if k else 0.0
            for a, b, k in zip(own, other, kept, strict=True)
        ]
        if level == "sequence":
            differences = [sum(differences)] * len(differences)
        result.append(
            [
                min(math.exp(d), cap) if k else 1.0
                for d, k in zip(differences, kept, strict=True)
            ]
        )
    return result


# Preferences ---------------------------------------------------------------------


def dpo(
    kind: str,
    chosen: float,
    rejected: float,
    ref_chosen: float,
    ref_rejected: float,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    discopop_temperature: float = 0.05,
) -> float:
    """The loss of one pair."""
    h = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    a, b = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    eps, half = label_smoothing, 1 / (2 * beta)
    if kind == "sigmoid":
        return -log_sigma(h)
    if kind == "hinge":
        return max(0.0, 1 - h)
    if kind == "ipo":
        return (h / beta - half) ** 2
    if kind == "robust":
        return (-(1 - eps) * log_sigma(h) + eps * log_sigma(-h)) / (1 - 2 * eps)
    if kind == "exo_pair":
        right = sigma(h) * (log_sigma(h) - math.log(1 - eps))
        return right + sigma(-h) * (log_sigma(-h) - math.log(eps))
    if kind == "nca_pair":
        return -log_sigma(a) - 0.5 * log_sigma(-a) - 0.5 * log_sigma(-b)
    if kind == "bco_pair":
        return -log_sigma(a) - log_sigma(-b)
    if kind == "sppo_hard":
        return (a / beta - half) ** 2 + (b / beta + half) ** 2
    if kind == "apo_zero":
        return 1 - sigma(a) + sigma(b)
    if kind == "apo_down":
        return sigma(a) + 1 - sigma(h)
    m = sigma(h / discopop_temperature)
    return -log_sigma(h) * (1 - m) + math.exp(-h) * m


def log_odds(s: float) -> float:
    return s - math.log(-math.expm1(s))


def orpo(chosen: float, rejected: float, beta: float) -> float:
    return -beta * log_sigma(log_odds(chosen) - log_odds(rejected))


def smoothed(
    chosen: float, rejected: float, beta: float, gamma: float, eps: float
) -> float:
    """CPO with γ = 0, SimPO otherwise."""
    h = beta * (chosen - rejected) - gamma
    return -(1 - eps) * log_sigma(h) - eps * log_sigma(-h)


def kto(s: float, ref: float, desirable: bool, kl: float, beta: float) -> float:
    sign = 1 if desirable else -1
    return 1 - sigma(sign * beta * (s - ref - kl))

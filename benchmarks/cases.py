"""The table of benchmarks: implementations, shapes and the goals for their ratios."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp

from ava_jax.kernel.platforms import HOPPER
from ava_jax.kernel.platforms import Implementation as KernelImplementation
from benchmarks import baselines, candidates, posttraining, shapes
from benchmarks.arrays import Batch, baseline, make_batch
from benchmarks.candidates import candidate
from benchmarks.posttraining import (
    CHECKPOINTED_GRPO,
    CHECKPOINTED_LOG_PROBS,
    NAIVE_GRPO,
    NAIVE_LOG_PROBS,
    ONE_PASS,
    OWN_LOG_PROBS,
    TWO_PASSES,
)
from benchmarks.shapes import Shape
from benchmarks.timing import Implementation

Metric = Literal["time", "cpu_time", "temp", "error", "bandwidth"]

# Baselines that are a number, not an implementation.
LOGITS_ARRAY = "one logits array"
EXACT = "float64 numpy"

BY_XLA = "plain, by XLA"
# By tokens per chunk; compared with what the package chooses for an accelerator.
CHUNKS = {tokens: f"plain, chunks of {tokens}" for tokens in (1024, 2048, 8192)}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A goal for the ratio of a candidate to a baseline.

    Attributes:
      candidate: a name of `IMPLEMENTATIONS`.
      baseline: another name, `LOGITS_ARRAY` or `EXACT`.
      metric: `"time"`, `"cpu_time"` (seconds of all processors) and `"temp"` (temporary
        memory) are ratios to the baseline's; `"error"` is the difference of the losses;
        `"bandwidth"` is the fraction of the copy's bandwidth.
      limit: the largest value that meets the goal; `None` without a goal.
    """

    candidate: str
    baseline: str
    metric: Metric
    limit: float | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """One benchmark and its goals.

    Attributes:
      group: its group, for `--group`.
      what: the first half of the title.
      shape: the sizes.
      goals: their candidates and baselines are the implementations to time.
      gradient: whether losses are timed with their gradients.
      needs_accelerator: whether it is skipped on a CPU.
    """

    group: str
    what: str
    shape: Shape
    goals: tuple[Goal, ...]
    gradient: bool = True
    needs_accelerator: bool = False

    @property
    def title(self) -> str:
        """What is computed, and its sizes."""
        return f"{self.what}, {self.shape}"

    @property
    def logits_bytes(self) -> int:
        """The bytes of one array of logits."""
        itemsize = jnp.dtype(self.shape.dtype).itemsize
        return self.shape.tokens * self.shape.vocab * itemsize

    def build(self) -> dict[str, Implementation]:
        """Draws the inputs and returns the implementations by name."""
        batch = make_batch(self.shape)
        pairs = [(goal.candidate, goal.baseline) for goal in self.goals]
        return {
            name: IMPLEMENTATIONS[name](self, batch)
            for pair in pairs
            for name in pair
            if name in IMPLEMENTATIONS
        }

    def exact_loss(self) -> float:
        """Computes the loss of the same inputs in float64."""
        batch = make_batch(self.shape)
        return baselines.exact_loss(batch.targets, **batch.floats)


def _plain(
    case: Case,
    batch: Batch,
    *,
    chunk: int | None = None,
    implementation: KernelImplementation | None = None,
) -> Implementation:
    """Returns plain cross-entropy, on request with a chunk of that many tokens."""
    config = dataclasses.replace(
        candidates.plain(case.shape.vocab),
        chunk_size=None if chunk is None else -(-chunk // case.shape.batch),
        implementation=implementation,
    )
    return candidate(config, batch, gradient=case.gradient)


def _everything(case: Case, batch: Batch) -> Implementation:
    config = candidates.everything(case.shape.vocab)
    return candidate(config, batch, gradient=case.gradient, report=True)


def _depths(case: Case, batch: Batch) -> Implementation:
    config = candidates.plain(case.shape.vocab)
    return candidate(candidates.with_depths(config, case.shape.depths), batch)


def _one_head(case: Case, batch: Batch) -> Implementation:
    floats = {k: v for k, v in batch.floats.items() if k != "mtp_hidden_states"}
    return _plain(case, batch._replace(floats=floats))


def _rollout(loss: posttraining.Loss) -> Callable[[Case, Batch], Implementation]:
    """Returns the maker of a loss of generated tokens, none of them masked."""

    def make(case: Case, batch: Batch) -> Implementation:
        rollout = posttraining.make_rollout(batch, case.shape.vocab)
        return posttraining.implementation(loss, batch, rollout)

    return make


def _masked(name: str) -> Callable[[Case, Batch], Implementation]:
    """Returns the maker of the cross-entropy under a mask."""

    def make(case: Case, batch: Batch) -> Implementation:
        mask = posttraining.masks(*batch.targets.shape)[name]
        rollout = posttraining.make_rollout(batch, case.shape.vocab, mask)
        return posttraining.implementation(posttraining.masked_loss, batch, rollout)

    return make


IMPLEMENTATIONS: dict[str, Callable[[Case, Batch], Implementation]] = {
    "plain": _plain,
    BY_XLA: functools.partial(_plain, implementation="xla"),
    **{name: functools.partial(_plain, chunk=n) for n, name in CHUNKS.items()},
    "everything": _everything,
    "repetition": lambda c, b: candidate(candidates.repetition(c.shape.vocab), b),
    "unlikelihood": lambda c, b: candidate(candidates.unlikelihood(c.shape.vocab), b),
    "depths": _depths,
    "one head": _one_head,
    "optax": lambda c, b: baseline(baselines.optax_loss, b, gradient=c.gradient),
    "naive": lambda c, b: baseline(baselines.naive, b, gradient=c.gradient),
    "naive depths": lambda _, b: baseline(baselines.naive_depths, b),
    "checkpointed": lambda _, b: baseline(baselines.checkpointed, b),
    "tokamax": lambda _, b: baseline(baselines.tokamax_loss, b),
    "tokamax xla": lambda _, b: baseline(
        functools.partial(baselines.tokamax_loss, implementation="xla"), b
    ),
    "one matmul": lambda _, b: baseline(baselines.matmul_forward, b, gradient=False),
    "three matmuls": lambda _, b: baseline(baselines.matmul_three, b, gradient=False),
    "copy": lambda _, b: baseline(baselines.copy, b, gradient=False),
    **{name: _rollout(loss) for name, loss in posttraining.LOSSES.items()},
    **{name: _masked(name) for name in posttraining.MASKS},
}


def _logits_cases() -> list[Case]:
    wide, narrow, half = shapes.LOGITS_WIDE, shapes.LOGITS, shapes.LOGITS_HALF
    everything = (
        Goal("everything", "optax", "time", 1.5),
        Goal("everything", LOGITS_ARRAY, "temp", 0.05),
    )
    cases = [
        Case(
            "logits-forward",
            "cross-entropy from logits",
            shape,
            (Goal("plain", "optax", "time", limit),),
            gradient=False,
        )
        for shape, limit in ((wide, 0.20), (narrow, 1.05))
    ]
    gradient = "logits-gradient", "cross-entropy and gradient from logits"
    cases += [
        Case(*gradient, shape, (Goal("plain", "optax", "time", 1.05),))
        for shape in (wide, narrow)
    ]
    less = (
        Goal("plain", "optax", "time", 0.75),
        Goal("plain", "optax", "temp", 0.5),
    )
    cases.append(Case(*gradient, half, less))
    named = "logits-everything", "everything and gradient from logits"
    return cases + [Case(*named, shape, everything) for shape in (wide, narrow)]


def _fused_cases() -> list[Case]:
    sizes = (
        (shapes.FUSED, 0.72),
        (shapes.FUSED_WIDE, 0.90),
        (shapes.FUSED_HALF, 0.65),
    )
    cases = [
        Case(
            "fused",
            "fused cross-entropy and gradient",
            shape,
            (
                Goal("plain", "naive", "time", limit),
                Goal("plain", "naive", "temp", 0.20),
            ),
        )
        for shape, limit in sizes
    ]
    everything = (Goal("everything", "naive", "time", 0.95),)
    chunked = (
        Goal("plain", "checkpointed", "time", 0.65),
        Goal("plain", "tokamax", "time", 0.75),
        Goal("plain", EXACT, "error", 1e-5),
    )
    no_gradient = (Goal("everything", "one matmul", "time", 1.25),)
    what = "fused everything and gradient"
    return [
        *cases,
        Case("fused-everything", what, shapes.FUSED, everything),
        Case("chunked", "fused and chunked, with gradient", shapes.FUSED, chunked),
        Case(
            "no-gradient",
            "fused everything without gradient",
            shapes.FUSED,
            no_gradient,
            gradient=False,
        ),
    ]


def _term_cases() -> list[Case]:
    depths = (
        Goal("depths", "naive depths", "time", 0.70),
        Goal("depths", "naive depths", "temp", 0.12),
        Goal("depths", "one head", "temp", 1.05),
    )
    penalties = (
        Goal("repetition", "plain", "time", 1.10),
        Goal("unlikelihood", "plain", "time", 1.10),
    )
    what = "main head and sequential depths, fused, with gradient"
    return [
        Case("depths", what, shapes.DEPTHS, depths),
        Case(
            "penalties",
            "penalties and gradient from logits, 8 rows",
            shapes.LOGITS_ROWS,
            penalties,
        ),
    ]


def _posttraining_cases() -> list[Case]:
    def against(own: str, naive: str, checkpointed: str, limit: float) -> list[Goal]:
        return [
            Goal(own, checkpointed, "time", limit),
            Goal(own, checkpointed, "cpu_time"),
            Goal(own, naive, "time"),
            Goal(own, naive, "temp"),
            Goal(own, checkpointed, "temp"),
        ]

    log_probs = against(OWN_LOG_PROBS, NAIVE_LOG_PROBS, CHECKPOINTED_LOG_PROBS, 1.0)
    policy = [
        goal
        for name, limit in ((ONE_PASS, 0.75), (TWO_PASSES, 1.0))
        for goal in against(name, NAIVE_GRPO, CHECKPOINTED_GRPO, limit)
    ]
    everything, *some = posttraining.MASKS
    masked = [Goal(name, everything, "time", 0.40) for name in some]
    masked += [Goal(name, everything, "cpu_time") for name in some]
    tables = {
        ("log-probs", "log-probabilities and gradient"): log_probs,
        ("policy", "GRPO and gradient"): policy,
        ("masked", "fused cross-entropy and gradient, masked"): masked,
    }
    return [
        Case(*named, shape, tuple(goals))
        for named, goals in tables.items()
        for shape in (shapes.FUSED, shapes.FUSED_HALF)
    ]


def _accelerator_cases(device_kind: str) -> list[Case]:
    goals = (
        Goal("plain", "naive", "time", 1.10),
        Goal("plain", "naive", "temp", 0.25),
        Goal("plain", "three matmuls", "time", 1.20),
        Goal("plain", "tokamax", "time", 0.60),
        Goal("plain", "tokamax xla", "time", 1.00),
        Goal("everything", "plain", "time", 1.10),
        *(Goal(name, "plain", "time") for name in CHUNKS.values()),
    )
    if HOPPER.search(device_kind):
        # Elsewhere plain is what XLA makes of it.
        goals += (Goal("plain", BY_XLA, "time", 1.00), Goal(BY_XLA, "naive", "temp"))
    bandwidth = (Goal("plain", "copy", "bandwidth"),)
    what = "fused cross-entropy and gradient"
    from_logits = (
        ("cross-entropy from logits", False),
        ("cross-entropy and gradient from logits", True),
    )
    return [
        Case("accelerator", what, shape, goals, needs_accelerator=True)
        for shape in shapes.ACCELERATOR
    ] + [
        Case(
            "accelerator",
            what,
            dataclasses.replace(shape, width=0),
            bandwidth,
            gradient=gradient,
            needs_accelerator=True,
        )
        for shape in shapes.ACCELERATOR
        for what, gradient in from_logits
    ]


def _model_cases(device_kind: str, quick: bool) -> list[Case]:
    goals = tuple(
        Goal(name, "naive", metric)
        for name in ("plain", "everything")
        for metric in ("time", "temp")
    )
    return [
        Case(
            "models",
            f"{model.name}, fused, with gradient",
            shapes.scaled(model, device_kind),
            goals,
        )
        for model in shapes.MODELS[: 1 if quick else None]
    ]


def table(device_kind: str, quick: bool = False) -> list[Case]:
    """Returns every case, each with a title of its own.

    Args:
      device_kind: `jax.Device.device_kind`, which the models are scaled to.
      quick: makes all shapes tiny; of cases that are then equal, one is kept.
    """
    cases = [
        *_logits_cases(),
        *_fused_cases(),
        *_term_cases(),
        *_posttraining_cases(),
        *_accelerator_cases(device_kind),
        *_model_cases(device_kind, quick),
    ]
    if not quick:
        return cases
    small = [dataclasses.replace(case, shape=shapes.tiny(case.shape)) for case in cases]
    return list({(case.group, case.title): case for case in small}.values())


GROUPS = tuple(dict.fromkeys(case.group for case in table("cpu")))

"""Time and memory of the compiled loss relative to the baselines.

Time is the TPU compiler's estimate; on a GPU it is the bytes that the kernels move.
"""

from typing import NamedTuple

import pytest
from support.compiled_programs import Setup, compiled

from benchmarks import hlo
from benchmarks.programs import NAIVE, OPTAX

V5P = Setup("v5p", "llama3-8b")
V5E = Setup("v5e", "gpt2-medium")
V6E = Setup("v6e", "qwen3-4b")
H100 = Setup("h100", "llama3-8b")
H100_SMALL = Setup("h100", "gpt2-medium")
# The main head, and K = 3 others: four times the work of naive.
HEADS = "plain, sequential MTP, K=3"
PARALLEL = "plain, parallel heads, K=3"
V5P_32 = Setup("v5p", "llama3-8b", (("data", 4), ("fsdp", 4), ("tensor", 2)))


class Limit(NamedTuple):
    """The largest time and memory that a candidate may need.

    Attributes:
      setup: the devices and sizes.
      name: the candidate's.
      time: as a ratio to the baseline's.
      temp: temporary memory, as a ratio to the naive loss's; for a loss from logits, to
        the bytes of the logits.
    """

    setup: Setup
    name: str
    time: float
    temp: float

    @property
    def from_logits(self) -> bool:
        """Whether the baseline is Optax on the same logits."""
        return self.name.endswith("from logits")

    def __str__(self) -> str:
        return f"{self.setup}: {self.name}"


# The goal; or, where it is out of reach, what is reached plus 3 %, with the goal in the
# comment.
LIMITS = (
    Limit(V5P, "plain", 1.00, 0.20),
    Limit(V5P, "everything", 1.08, 0.20),
    Limit(V5P, "plain, from logits", 0.73, 0.01),
    Limit(V5P, "everything, from logits", 1.15, 0.01),
    Limit(V6E, "everything, from logits", 1.28, 0.02),
    Limit(V5E, "plain", 0.94, 0.15),
    Limit(V5E, "everything", 0.99, 0.15),
    Limit(V6E, "plain", 0.81, 0.22),
    Limit(V6E, "everything", 1.24, 0.22),
    Limit(V5P, "plain, with a bias", 1.02, 0.20),
    Limit(V5E, "plain, with a bias", 1.02, 0.15),
    Limit(V5P, HEADS, 3.98, 0.22),
    Limit(V5P, PARALLEL, 4.12, 0.30),
    Limit(V5P_32, "plain", 1.02, 0.30),
    Limit(V5P_32, "everything", 1.10, 0.30),
    # In-place scatters cost only the bytes they change, which lowers the baselines.
    Limit(H100, "plain", 1.00, 0.18),
    Limit(H100, "everything", 1.01, 0.19),
    Limit(H100, "plain, with a bias", 1.10, 0.18),
    Limit(H100, "plain, by XLA", 1.42, 0.26),  # 1.00, 0.25
    Limit(H100, "everything, by XLA", 1.42, 0.27),  # 1.10
    Limit(H100, HEADS, 4.02, 0.18),
    Limit(H100, PARALLEL, 4.64, 0.48),
    Limit(H100_SMALL, "plain, from logits", 0.39, 0.002),
    Limit(H100_SMALL, "everything, from logits", 0.39, 0.005),
)


def ratios(limit: Limit) -> tuple[float, float]:
    """Returns a candidate's time and memory as the ratios of its limits."""
    own = compiled(limit.setup, limit.name)
    base = compiled(limit.setup, OPTAX if limit.from_logits else NAIVE)
    sizes = limit.setup.sizes
    logits = 2 * sizes.tokens * sizes.vocab
    temp = logits if limit.from_logits else base.temp
    return own.amount / base.amount, own.temp / temp


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_time(limit: Limit) -> None:
    time, _ = ratios(limit)
    assert round(time, 3) <= limit.time


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_trip_counts_of_loops_are_known(limit: Limit) -> None:
    """Except for the loop that recomputes sums which were too inexact.

    On a GPU, the first chunk is computed before the others, and has its own. So have
    the main head and others.
    """
    loops = compiled(limit.setup, limit.name).open_loops
    has_another = limit.setup.chip == "h100" and not limit.from_logits
    passes = 2 if limit.name in (HEADS, PARALLEL) else 1
    assert len(loops) <= passes * (1 + has_another)


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_memory(limit: Limit) -> None:
    _, temp = ratios(limit)
    assert round(temp, 3) <= limit.temp


FUSED = [x for x in LIMITS if not x.from_logits and not x.setup.mesh]
TPU7X = Setup("tpu7x", "4x4096x512x32768")


@pytest.mark.parametrize(
    ("setup", "name"),
    [(x.setup, x.name) for x in FUSED] + [(TPU7X, "plain"), (TPU7X, "everything")],
    ids=str,
)
def test_no_array_of_tokens_times_vocabulary(setup: Setup, name: str) -> None:
    sizes = setup.sizes
    arrays = hlo.parse(compiled(setup, name).text).arrays()
    largest = max(arrays, key=lambda array: array.size)
    assert largest.size < sizes.tokens * sizes.vocab, largest

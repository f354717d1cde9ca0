"""The package reproduces the reference numbers: values, gradients and state."""

from pathlib import Path

import jax
import pytest
from support.golden_cases import HEAD_KINDS, GoldenCase, compare, golden_cases, run_case

HERE = Path(__file__).parent
CASES = [case for case in golden_cases() if case.kind not in HEAD_KINDS]

FLOAT32 = 2e-5
FLOAT64 = 1e-8
# The gradients are stored in float32, whatever the precision of the run.
STORED_GRADIENT = 1e-7


def check(case: GoldenCase, tolerance: float, gradient_tolerance: float) -> None:
    for step, (out, grad, state) in enumerate(run_case(case)):
        compare(case, step, "out", out, tolerance)
        compare(case, step, "grad", grad, gradient_tolerance)
        compare(case, step, "state", state, tolerance)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case: GoldenCase) -> None:
    check(case, FLOAT32, FLOAT32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64(case: GoldenCase) -> None:
    with jax.enable_x64(True):
        check(case, FLOAT64, STORED_GRADIENT)


def test_every_case_is_compared_somewhere() -> None:
    heads = [case for case in golden_cases() if case.kind in HEAD_KINDS]
    assert (len(CASES), len(heads)) == (140, 11)
    tests = "".join(
        path.read_text() for path in (HERE / "heads").glob("test_heads*.py")
    )
    assert all(f'"{kind}"' in tests for kind in HEAD_KINDS)


def test_a_wrong_number_is_noticed() -> None:
    case = CASES[0]
    right = dict(case.arrays[0]["out"])
    compare(case, 0, "out", right, FLOAT64)
    for wrong in (right["main_loss"] * (1 + 1e-7), float("nan")):
        with pytest.raises(AssertionError, match="main_loss"):
            compare(case, 0, "out", {**right, "main_loss": wrong}, FLOAT64)
    with pytest.raises(AssertionError, match="no out/"):
        compare(case, 0, "out", {"main_loss": right["main_loss"]}, FLOAT64)

"""The same run gives the same bits, every time."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from rich.console import Console
from run_helpers import EXAMPLES, environment, with_flags

from train_tpu import Gradient, Run, make_gradient
from trainer.run.devices import use_deterministic_operations
from trainer.run.folder import FREE
from trainer.run.settings import parse_settings

RUNS = 20


def digest(tree: optax.Params) -> str:
    """Of every bit of a tree."""
    sums = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        sums.update(np.asarray(leaf).tobytes())
    return sums.hexdigest()


def make_run(arguments: list[str]) -> Run:
    return Run(*parse_settings(arguments), console=Console(quiet=True))


def compiled(run: Run) -> Gradient:
    return jax.jit(make_gradient(run.settings, run.model, run.loss_fn, run.mesh))


def digests(gradient: Gradient, run: Run, count: int) -> list[str]:
    """Of the first batch's gradient, taken anew each time."""
    rows = next(run.batches)
    return [digest(gradient(run.state, run.share.put(rows))[0]) for _ in range(count)]


def gradients(arguments: list[str], count: int) -> list[str]:
    """Digests of the first batch's gradient, in a process of its own."""
    run = make_run(arguments)
    return digests(compiled(run), run, count)


@pytest.fixture(
    params=["data=1", pytest.param("data=4,tensor=2", marks=pytest.mark.slow)]
)
def run(tiny: list[str], tmp_path: Path, request: pytest.FixtureRequest) -> Run:
    """A run on a mesh, before its first step."""
    flags = with_flags(tiny, "--mesh", request.param, "--out", str(tmp_path))
    return make_run([*flags, "--loss.unlikelihood-weight", "0.1"])


# Only the gradient is compiled as for users, not what makes the parameters.
def test_twenty_gradients_are_the_same_to_the_bit(run: Run, optimized: None) -> None:
    gradient = compiled(run)
    found = digests(gradient, run, RUNS)
    assert len(set(found)) == 1
    # The next batch has another one.
    assert digests(gradient, run, 1)[0] != found[0]


@pytest.mark.slow
def test_fresh_processes_give_the_same_gradient(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    found: set[str] = set()
    for index in range(4):
        arguments = with_flags(tiny, "--out", str(tmp_path / str(index)))
        code = (
            "import test_train_determinism as tests\n"
            f"print(*tests.gradients({arguments!r}, {RUNS // 4}))"
        )
        folders = (EXAMPLES, Path(__file__).parent, Path(__file__).parents[1])
        path = os.pathsep.join(map(str, folders))
        own = environment(programs, is_quick=False) | {
            "PYTHONPATH": path,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        }
        if index == 0:
            # This one compiles the program itself.
            own["JAX_ENABLE_COMPILATION_CACHE"] = "0"
        end = subprocess.run(
            [sys.executable, "-c", code],
            env=own,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert end.returncode == 0, end.stderr
        found.update(end.stdout.split())
    assert len(found) == 1


def test_the_flag_reaches_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    use_deterministic_operations()
    expected = "--xla_something=1 --xla_gpu_deterministic_ops=true"
    assert os.environ["XLA_FLAGS"] == expected
    assert "deterministic" in FREE


@pytest.mark.slow
def test_a_run_with_the_flag_trains(
    tiny: list[str], tmp_path: Path, programs: Path
) -> None:
    flags = with_flags(tiny, "--out", str(tmp_path), "--steps", "1")
    end = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_tpu.py"), *flags, "--deterministic"],
        env=environment(programs),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert end.returncode == 0, end.stderr
    assert '"deterministic": true' in (tmp_path / "config.json").read_text()

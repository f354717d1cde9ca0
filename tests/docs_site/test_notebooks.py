"""The notebooks: each runs, and prints what is stored in it."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from support.pages import DOCS, ROOT

pytestmark = pytest.mark.every_platform

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
SLOW = ("quick_start", "fused_on_a_mesh")  # five seconds and more of compiling
MAGIC = re.compile(r"^( *)%.*$", re.MULTILINE)
NUMBER = re.compile(r"\d+(?:\.\d+)?")
# Temporary memory is the compiler's affair, and differs from version to version.
MEMORY = re.compile(r"temporary \d+\.\d+ MiB")
SHARDED = "fused_on_a_mesh"
RUNS = [
    pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem in SLOW))
    for path in NOTEBOOKS
]


def code_of(notebook: Path) -> list[tuple[str, str]]:
    """The code cells, without what only IPython understands, and their outputs."""
    cells = json.loads(notebook.read_text())["cells"]
    return [
        (
            MAGIC.sub(r"\1pass", "".join(cell["source"])),
            "".join(text for out in cell["outputs"] for text in out["text"]),
        )
        for cell in cells
        if cell["cell_type"] == "code"
    ]


def run_here(notebook: Path) -> list[str]:
    """What each cell prints."""
    namespace: dict[str, Any] = {"__name__": "notebook"}
    printed = []
    for number, (source, _) in enumerate(code_of(notebook), start=1):
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(compile(source, f"{notebook.name}, cell {number}", "exec"), namespace)
        printed.append(output.getvalue())
    return printed


def run_in_process(notebook: Path) -> list[str]:
    """The same in a process of its own, whose devices the notebook chooses."""
    separator = "-- end of a cell --"
    source = f"\nprint({separator!r})\n".join(cell for cell, _ in code_of(notebook))
    settings = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    env = {k: v for k, v in os.environ.items() if k not in settings}
    done = subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split(separator + "\n")


def assert_prints(printed: str, stored: str) -> None:
    """The words are equal, the numbers nearly, to a unit of the second decimal."""
    printed, stored = (MEMORY.sub("temporary", text) for text in (printed, stored))
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", stored)
    numbers = ([float(x) for x in NUMBER.findall(text)] for text in (printed, stored))
    np.testing.assert_allclose(*numbers, rtol=2e-3, atol=0.011)


@pytest.mark.parametrize("notebook", RUNS)
def test_a_notebook_prints_what_is_stored(notebook: Path) -> None:
    run = run_in_process if notebook.stem == SHARDED else run_here
    with jax.numpy_dtype_promotion("standard"):
        outputs = run(notebook)
    stored = [output for _, output in code_of(notebook)]
    assert sum(map(bool, stored)) >= 4
    for printed, expected in zip(outputs, stored, strict=True):
        assert_prints(printed, expected)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_opens_with_one_install_cell(notebook: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    installing = [c for c in cells if "%pip" in "".join(c["source"])]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert installing == code[:1]
    assert cells[0]["source"][0].startswith("# ")


def test_other_words_and_numbers_are_seen() -> None:
    assert_prints("loss 2.001, temporary 3.0 MiB", "loss 2.0, temporary 9.0 MiB")
    for other in ("loss 3.001", "nll 2.001", "loss 2.001 nats"):
        with pytest.raises(AssertionError):
            assert_prints(other, "loss 2.0")

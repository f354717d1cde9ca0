"""Programs that the tests share: each is compiled once."""

import dataclasses
import functools
from typing import NamedTuple

import pytest

from benchmarks import costs, hlo
from benchmarks.candidates import entries, place_on
from benchmarks.compiled import read_shape
from benchmarks.shapes import Shape
from benchmarks.topologies import CHIPS, compile_for, missing

Mesh = tuple[tuple[str, int], ...]


class Measured(NamedTuple):
    """A compiled program and what is read of it.

    Attributes:
      text: the program.
      amount: cycles by the estimate of the TPU's compiler, or bytes moved on a GPU.
      temp: bytes of temporaries.
      open_loops: the loops whose turns depend on the data; each counts as one turn.
    """

    text: str
    amount: int
    temp: int
    open_loops: list[str]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where programs run, and on what.

    Attributes:
      chip: a name of `benchmarks.topologies.CHIPS`.
      shape: as on the command line of `benchmarks.compiled`.
      mesh: its axes' names and sizes; empty for one device.
    """

    chip: str
    shape: str
    mesh: Mesh = ()

    @property
    def sizes(self) -> Shape:
        """The shape of all devices' arrays together."""
        return read_shape(self.shape, dict(self.mesh))

    def __str__(self) -> str:
        mesh = "".join(f" {name}={size}" for name, size in self.mesh)
        return f"{self.chip} {self.shape}{mesh}"


@functools.cache
def compiled(setup: Setup, name: str) -> Measured:
    """Returns the program of an entry; skips where its compiler is not installed."""
    if reason := missing(setup.chip):
        pytest.skip(reason)
    place = place_on(setup.chip, dict(setup.mesh))
    entry = next(e for e in entries(setup.sizes, place) if e.name == name)
    found = compile_for(
        setup.chip, entry.step, *entry.arguments, out_shardings=entry.out_shardings()
    )
    text = str(found.as_text())
    program = hlo.parse(text)
    memory = found.memory_analysis()
    assert memory is not None
    estimated = CHIPS[setup.chip].clock is not None
    count = costs.estimated_cycles if estimated else costs.moved_bytes
    loops = hlo.unknown_loops(program)
    return Measured(text, count(program), memory.temp_size_in_bytes, loops)

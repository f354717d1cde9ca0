"""Programs shared by the tests; each is compiled once."""

import dataclasses
import functools
from typing import NamedTuple

import pytest

from benchmarks import costs, hlo
from benchmarks.compiled import read_shape
from benchmarks.programs import devices_of, entries
from benchmarks.shapes import Shape
from benchmarks.topologies import CHIPS, compile_for, missing

Mesh = tuple[tuple[str, int], ...]


class Measured(NamedTuple):
    """A compiled program and its figures.

    Attributes:
      text: the program.
      amount: cycles as the TPU's compiler estimates them, or bytes moved on a GPU.
      temp: bytes of temporary memory.
      open_loops: the loops whose trip count depends on the data; counted once.
    """

    text: str
    amount: int
    temp: int
    open_loops: list[str]


@dataclasses.dataclass(frozen=True)
class Setup:
    """The devices of a program, and its sizes.

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
        """The shape of the whole batch."""
        return read_shape(self.shape, dict(self.mesh))

    def __str__(self) -> str:
        mesh = "".join(f" {name}={size}" for name, size in self.mesh)
        return f"{self.chip} {self.shape}{mesh}"


@functools.cache
def compiled(setup: Setup, name: str) -> Measured:
    """Returns the program of an entry; skips if its compiler is not installed."""
    if reason := missing(setup.chip):
        pytest.skip(reason)
    target = devices_of(setup.chip, dict(setup.mesh))
    entry = next(e for e in entries(setup.sizes, target) if e.name == name)
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

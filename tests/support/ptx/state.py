"""The state of a block of threads: its warps, its barriers, and what is under way."""

import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from support.ptx.arithmetic import LANES, TYPES, constant
from support.ptx.program import Launch, Program
from support.ptx.shared_memory import BASE, SharedMemory

MAPS = 1 << 60  # the address of the tensor maps
_ARGUMENT = 40  # an array's address has its number in the bits from here
_BARRIERS = 32


class Barrier:
    """A barrier in shared memory.

    Attributes:
      agent: its component of the clocks.
      maker: the warp that has made it.
      made: when that was, by the warp's own clock.
      expected: how many arrivals complete a phase.
      pending: how many of them are missing.
      bytes: how many are expected of copies, less those that have arrived.
      phase: how many phases are complete.
      clock: what is known to those that have arrived.
      known: the same, when the last phase was complete.
    """

    def __init__(self, agent: int, maker: "Warp", expected: int) -> None:
        self.agent = agent
        self.maker, self.made = maker.number, maker.clock[maker.number]
        self.expected = self.pending = expected
        self.bytes = self.phase = 0
        self.clock = np.zeros_like(maker.clock)
        self.known = self.clock

    def arrive(self, count: int, clock: np.ndarray) -> None:
        """Lets threads arrive."""
        assert count <= self.pending, "more arrivals than expected"
        self.clock = np.maximum(self.clock, clock)
        self.pending -= count
        self.turn()

    def turn(self) -> None:
        """Begins the next phase if this one is complete."""
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected
            self.known = self.clock.copy()
            self.known[self.agent] = self.phase


class Warp:
    """A warp.

    Attributes:
      number: within its block.
      block: that of the block, along each axis.
      maps: the number of the parameter that holds the tensor maps.
      registers: the values of its lanes, by name.
      next: the index of its next instruction.
      is_done: whether it is at its end.
      clock: what it knows of others.
      resume: tries to go on if it waits.
      busy: the registers that products will write.
      unfenced: those written since products were last told.
      products: those issued, in groups that were committed together, and the last one.
      stores: copies from shared memory, likewise.
    """

    def __init__(self, number: int, block: tuple[int, ...], agents: int, maps: int):
        self.number, self.block, self.maps = number, block, maps
        self.registers: dict[str, np.ndarray] = {}
        self.next, self.is_done = 0, False
        self.clock = np.zeros(agents, int)
        self.clock[number] = 1
        self.resume: Callable[[], bool] | None = None
        self.busy: set[str] = set()
        self.unfenced: set[str] = set()
        self.products: list[list[Any]] = [[]]
        self.stores: list[list[Any]] = [[]]

    def learn(self, clock: np.ndarray) -> None:
        """Acquires what others have released."""
        self.clock = np.maximum(self.clock, clock)

    def release(self) -> np.ndarray:
        """Returns what others may now know."""
        released = self.clock.copy()
        self.clock[self.number] += 1
        return released

    def get(self, operand: str, kind: str) -> np.ndarray:
        """Returns an operand's values.

        Args:
          operand: a register, a number or a symbol.
          kind: a type of PTX, such as `s32`.
        """
        dtype = TYPES[kind]
        if operand in self.registers:
            assert operand not in self.busy, f"{operand} is not computed yet"
            return self.registers[operand].view(dtype)
        if operand == "%tid.x":
            lanes = np.arange(LANES, dtype=np.uint32)
            return (lanes + self.number * LANES).view(dtype)
        if found := re.fullmatch(r"%ctaid\.([xyz])", operand):
            return np.full(LANES, self.block["xyz".index(found[1])], dtype)
        if found := re.fullmatch(r"\w+_param_(\d+)", operand):
            assert int(found[1]) == self.maps, "another parameter's address"
            return np.full(LANES, MAPS, dtype)
        if operand == "__dynamic_shmem__0":
            return np.full(LANES, BASE, dtype)
        assert operand[0] != "%", f"{operand} was never written"
        return constant(operand, dtype)

    def set(self, operand: str, value: np.ndarray, lanes: np.ndarray) -> None:
        """Writes a register of some lanes."""
        assert operand not in self.busy, f"{operand} is not computed yet"
        if value.dtype != np.bool_:
            value = value.view(f"uint{8 * value.dtype.itemsize}")
        if not lanes.all():
            value = np.where(lanes, value, self.registers[operand])
        self.registers[operand] = value
        self.unfenced.add(operand)

    def addresses(self, operand: str) -> np.ndarray:
        """Returns an address per lane, given in brackets."""
        base, _, offset = operand.strip("[] ").partition("+")
        is_short = base.startswith("%r") and not base.startswith("%rd")
        found = self.get(base, "u32" if is_short else "u64")
        return found.astype(np.int64) + int(offset or 0)

    def one(self, operand: str, lanes: np.ndarray, kind: str = "u32") -> int:
        """Returns what is the same number, or address, for all lanes that execute."""
        is_address = operand[0] == "["
        found = self.addresses(operand) if is_address else self.get(operand, kind)
        (value,) = set(found[lanes].tolist())
        return value


class Block:
    """A block of threads.

    Attributes:
      program: what it executes.
      launch: how it is launched.
      arrays: all of the kernel, as bytes.
      haste: the probability that what is asynchronous happens early.
      random: decides what happens next.
      memory: the shared memory.
      warps: the warps.
      barriers: by their addresses.
      meetings: by the number of a barrier without an address, the warps that wait.
      copies: those on their way to shared memory.
    """

    def __init__(
        self,
        program: Program,
        launch: Launch,
        arrays: list[np.ndarray],
        index: tuple[int, ...],
        *,
        seed: int = 0,
        haste: float = 0.5,
    ) -> None:
        self.program, self.launch, self.arrays = program, launch, arrays
        self.haste, self.random = haste, random.Random(seed)
        count = launch.threads // LANES
        self.memory = SharedMemory(launch.shared, count)
        facts = index, count + _BARRIERS, len(launch.arguments)
        self.warps = [Warp(number, *facts) for number in range(count)]
        self.barriers: dict[int, Barrier] = {}
        self.meetings: dict[int, list[Warp]] = {}
        self.copies: list[Callable[[], None]] = []

    def is_early(self) -> bool:
        """Whether something asynchronous happens at once."""
        return self.random.random() < self.haste

    def array(self, address: int) -> tuple[np.ndarray, int]:
        """Returns the array that an address is in, and where in it."""
        number, start = address >> _ARGUMENT, address & ((1 << _ARGUMENT) - 1)
        array = self.arrays[number - 1]
        assert 0 <= start < array.size, "beyond the end of an array"
        return array, start

    def address(self, parameter: int) -> int:
        """Returns the address of a parameter's array."""
        return (self.launch.arguments[parameter] + 1) << _ARGUMENT


def finished(groups: list[list[Any]], left: int) -> list[list[Any]]:
    """Removes and returns the committed groups but the last ones."""
    count = max(len(groups) - 1 - left, 0)
    found = groups[:count]
    del groups[:count]
    return found

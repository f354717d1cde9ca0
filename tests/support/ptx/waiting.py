"""Instructions of barriers."""

import numpy as np

from support.ptx.arithmetic import LANES
from support.ptx.state import Barrier, Block, Warp


def meet(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Waits for other warps: `bar.sync`."""
    place, count = warp.one(operands[0], lanes), len(block.warps)
    if len(operands) > 1:
        count = warp.one(operands[1], lanes) // LANES
    here = block.meetings.setdefault(place, [])
    here.append(warp)
    warp.resume = lambda: False
    if len(here) == count:
        clock = np.max([other.release() for other in here], 0)
        for other in here:
            other.learn(clock)
            other.resume = None
        block.meetings[place] = []


def initialize(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Makes a barrier: `mbarrier.init`."""
    address = warp.one(operands[0], lanes)
    assert address not in block.barriers, "made twice"
    agent = len(block.warps) + len(block.barriers)
    block.barriers[address] = Barrier(agent, warp, warp.one(operands[1], lanes))


def barrier_at(block: Block, warp: Warp, operand: str, lanes) -> Barrier:
    """Returns a barrier that a warp knows to exist."""
    barrier = block.barriers.get(warp.one(operand, lanes))
    assert barrier, "it may not exist yet"
    assert warp.clock[barrier.maker] >= barrier.made, "it may not exist yet"
    return barrier


def arrive(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Lets each lane arrive, and expect bytes: `mbarrier.arrive`."""
    barrier, count = barrier_at(block, warp, operands[1], lanes), int(lanes.sum())
    if "expect_tx" in name:
        barrier.bytes += count * warp.one(operands[2], lanes)
    elif len(operands) > 2:
        assert operands[2] == "1"
    barrier.arrive(count, warp.release())


def wait(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Waits for a phase of a parity: `mbarrier.try_wait`, which may take any time."""
    barrier = barrier_at(block, warp, operands[1], lanes)
    parity = warp.one(operands[2], lanes)
    warp.set(operands[0], np.ones(LANES, bool), lanes)

    def resume() -> bool:
        if barrier.phase % 2 == parity:
            return False
        warp.learn(barrier.known)
        return True

    warp.resume = resume


INSTRUCTIONS = {
    "bar.sync": meet,
    "mbarrier.init": initialize,
    "mbarrier.arrive": arrive,
    "mbarrier.try_wait.parity": wait,
}

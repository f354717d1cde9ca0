"""A block of threads of a Hopper GPU, executed warp by warp in a random order.

Copies and products complete at random times between when they are issued and when they
are waited for. The lanes of a warp execute together and may not diverge.
"""

import re
from collections.abc import Callable

import numpy as np

from support.ptx import arithmetic, copies, multiplying, waiting
from support.ptx.arithmetic import LANES
from support.ptx.program import Instruction
from support.ptx.shared_memory import WORD
from support.ptx.state import Block, Warp

_LONGEST_RUN = 64
_LEADER = 5  # the lane that is elected: any, but always the same


def run(block: Block) -> None:
    """Executes a block to its end."""
    while not all(warp.is_done for warp in block.warps):
        ready = [warp for warp in block.warps if _can_go_on(warp)]
        if block.copies and (not ready or block.is_early()):
            block.copies.pop(block.random.randrange(len(block.copies)))()
        elif ready:
            _run_a_while(block, block.random.choice(ready))
        else:
            raise AssertionError("all warps wait for ever")
    assert not block.copies, "a copy arrives after the end"
    for warp in block.warps:
        assert not warp.busy, "a product is not waited for"
        assert warp.stores == [[]], "a copy is not waited for"


def _can_go_on(warp: Warp) -> bool:
    if warp.resume is not None and warp.resume():
        warp.resume = None
    return not warp.is_done and warp.resume is None


def _run_a_while(block: Block, warp: Warp) -> None:
    for _ in range(block.random.randint(1, _LONGEST_RUN)):
        if warp.is_done or warp.resume is not None:
            return
        instruction = block.program.instructions[warp.next]
        warp.next += 1
        try:
            _execute(block, warp, instruction)
        except AssertionError as error:
            error.add_note(f"warp {warp.number}: {instruction}")
            raise


def _execute(block: Block, warp: Warp, instruction: Instruction) -> None:
    name, operands, guard, expected = instruction
    lanes = np.ones(LANES, bool)
    if guard:
        lanes = warp.registers[guard] == expected
    if not lanes.any():
        return
    for prefix, execute in _INSTRUCTIONS.items():
        if name.startswith(prefix):
            execute(block, warp, name, operands, lanes)
            return
    target, *sources = operands
    found = _computed(warp, name, sources)
    warp.set(target, np.asarray(found), lanes)


def _computed(warp: Warp, name: str, sources: list[str]) -> np.ndarray:
    """Returns what an instruction computes that has no other effect."""
    operation, _, kind = name.rpartition(".")
    if operation.startswith("setp."):
        compare, _, joined = operation[5:].partition(".")
        found = arithmetic.COMPARISONS[compare](
            *(warp.get(x, kind) for x in sources[:2])
        )
        assert joined in ("", "and"), "an unknown instruction"
        return found & warp.get(sources[2], "pred") if joined else found
    if operation == "selp":
        first, second = (warp.get(x, kind) for x in sources[:2])
        return np.where(warp.get(sources[2], "pred"), first, second)
    given = [warp.get(x, kind) for x in sources]
    if name.startswith("cvt."):
        return arithmetic.convert(name, *given)
    assert operation in arithmetic.OPERATIONS, "an unknown instruction"
    with np.errstate(all="ignore"):
        return arithmetic.OPERATIONS[operation](*given)


def _do_nothing(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Has no effect here."""


def _branch(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    assert lanes.all(), "lanes diverge"
    warp.next = block.program.labels[operands[0]]


def _return(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    warp.is_done = True


def _elect(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    leader, chosen = operands[0].split("|")
    warp.set(leader, np.full(LANES, _LEADER, np.uint32), lanes)
    warp.set(chosen, np.arange(LANES) == _LEADER, lanes)


def _shuffle(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    target, source, by, clamp, members = operands
    assert (clamp, members) == ("31", "-1")
    assert lanes.all(), "a lane is missing"
    other, by = np.arange(LANES), warp.one(by, lanes)
    other = other ^ by if ".bfly." in name else np.full(LANES, by)
    warp.set(target, warp.get(source, "u32")[other], lanes)


def _load_parameter(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    target, source = operands
    found = re.search(r"param_(\d+)\]", source)
    assert found, "another parameter"
    address = block.address(int(found[1]))
    warp.set(target, np.full(LANES, address, np.uint64), lanes)


def _load_global(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    array, start = block.array(warp.one(operands[1], lanes))
    found = array[start : start + WORD].view(np.uint32)
    warp.set(operands[0], np.repeat(found, LANES), lanes)


def _load_shared(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    assert lanes.all(), "a lane is missing"
    address = warp.addresses(operands[1])
    for number, target in enumerate(re.findall(r"%\w+", operands[0])):
        at = address + WORD * number
        found = block.memory.load(warp.number, warp.clock, at)
        warp.set(target, found, lanes)


def _store_shared(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    assert name == "st.shared.b32", "an unknown instruction"
    assert lanes.all(), "a lane is missing"
    address, values = warp.addresses(operands[0]), warp.get(operands[1], "b32")
    block.memory.store(warp.number, warp.clock, address, values)


def _store_matrices(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Stores four matrices of 8×8 numbers of 16 bits; each lane has a row's address."""
    assert ".m8n8.x4." in name, "an unknown instruction"
    assert lanes.all(), "a lane is missing"
    address, lane = warp.addresses(operands[0]), np.arange(LANES)
    for number, source in enumerate(re.findall(r"%\w+", operands[1])):
        at = address[8 * number + lane // 4] + WORD * (lane % 4)
        block.memory.store(warp.number, warp.clock, at, warp.get(source, "b32"))


def _fence(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    block.memory.fence(warp.number)


_INSTRUCTIONS: dict[str, Callable[..., None]] = {
    "bra": _branch,
    "ret": _return,
    "elect.sync": _elect,
    "shfl.sync.": _shuffle,
    "ld.param": _load_parameter,
    "ld.global.b32": _load_global,
    "ld.shared": _load_shared,
    "st.shared": _store_shared,
    "stmatrix.sync.aligned": _store_matrices,
    "fence.proxy.async.shared::cta": _fence,
    "fence.mbarrier_init": _do_nothing,
    "setmaxnreg": _do_nothing,
    "prefetch.tensormap": _do_nothing,
    **waiting.INSTRUCTIONS,
    **copies.INSTRUCTIONS,
    **multiplying.INSTRUCTIONS,
}

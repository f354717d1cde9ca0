"""Instructions of asynchronous products."""

import re

import numpy as np

from support.ptx import products
from support.ptx.state import Block, Warp, finished

_WARPS_PER_GROUP = 4


class _Product:
    """A product that has been issued.

    Attributes:
      registers: those it is added to.
      operands: where they are.
      adds: whether it is added, or replaces what is in the registers.
      is_done: whether it has been computed.
    """

    def __init__(self, registers: list[str], operands: products.Operands, adds: bool):
        self.registers, self.operands, self.adds = registers, operands, adds
        self.is_done = False

    def compute(self, block: Block, warp: Warp) -> None:
        """Computes it, the first time; what it makes is known to who waits."""
        if self.is_done:
            return
        self.is_done = True
        found = products.multiply(block.memory.bytes, self.operands)
        row, column = products.places(len(self.registers))
        for name, more in zip(self.registers, found[row, column], strict=True):
            old = warp.registers[name].view(np.float32)
            new = old + more if self.adds else more
            warp.registers[name] = new.view(np.uint32)


def multiply(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Issues a product: `wgmma.mma_async`."""
    listed, left, right, adds, *rest = operands
    shape = re.search(r"m64n(\d+)k16\.f32\.bf16\.bf16", name)
    assert shape, "another kind of product"
    assert rest == ["1", "1", "0", "1"], "another kind of product"
    descriptors = (warp.one(x, lanes, "u64") for x in (left, right))
    number = warp.number % _WARPS_PER_GROUP
    at = products.operands(*descriptors, number, int(shape[1]))
    block.memory.begin_read(warp.clock, at.words)
    registers = re.findall(r"%\w+", listed)
    assert warp.unfenced.isdisjoint(registers), "registers are not fenced"
    warp.busy.update(registers)
    adds = bool(warp.registers[adds].all())
    warp.products[-1].append(_Product(registers, at, adds))
    for product in (x for group in warp.products for x in group):
        if not block.is_early():
            break
        product.compute(block, warp)


def fence(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Lets products know what registers hold: `wgmma.fence`."""
    warp.unfenced.clear()


def commit(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Makes a group of the last products: `wgmma.commit_group`."""
    warp.products.append([])


def wait(block: Block, warp: Warp, name: str, operands, lanes) -> None:
    """Waits for all groups but the last ones: `wgmma.wait_group`."""
    for group in finished(warp.products, int(operands[0])):
        for product in group:
            product.compute(block, warp)
            block.memory.end_read(warp.number, warp.clock, product.operands.words)
    if not any(warp.products):
        warp.busy.clear()


INSTRUCTIONS = {
    "wgmma.mma_async": multiply,
    "wgmma.fence": fence,
    "wgmma.commit_group": commit,
    "wgmma.wait_group": wait,
}

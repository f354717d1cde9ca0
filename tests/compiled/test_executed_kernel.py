"""The kernel for GPUs, as compiled for an H100, executed instruction by instruction.

Pallas's interpreter executes what was written. This executes what the compiler made of
it, with its layouts, barriers and asynchronous copies.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ptx import kernels
from support.ptx.program import Instruction

from ava_jax import Query, Vocabulary
from ava_jax.kernel import mosaic_gpu
from ava_jax.kernel.product import Product
from benchmarks.topologies import missing

pytestmark = pytest.mark.skipif(bool(missing("h100")), reason=missing("h100"))


class Case(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      rows: tokens.
      features: D.
      width: V with the padding.
      size: V.
      ids: of the query.
      temperature: T, or None.
      moment: whether the moment at T is wanted.
      biased: whether there is a bias, some of it −inf.
      scale: what products are multiplied with, or None.
      writes: whether it writes exponentials.
    """

    rows: int = 200
    features: int = 320
    width: int = 512
    size: int = 512
    ids: int = 1
    temperature: float | None = None
    moment: bool = False
    biased: bool = False
    scale: float | None = None
    writes: bool = True


CASES = {
    "one id": Case(),
    "no exponentials": Case(writes=False),
    "a single step": Case(rows=128, features=64, width=256, size=256),
    "two steps": Case(rows=7, features=128),
    "many steps": Case(rows=40, features=4096, width=256, size=256),
    "rows that divide nothing": Case(rows=203, features=192, width=320, size=320),
    "eleven ids and a temperature": Case(ids=11, temperature=0.7),
    "sixteen ids and everything": Case(
        rows=64, width=704, size=600, ids=16, temperature=1.3, moment=True, biased=True
    ),
    "a scale": Case(rows=100, width=320, size=300, biased=True, scale=0.5),
}


class Inputs(NamedTuple):
    """The arrays of a case."""

    hidden: Any
    kernel: Any
    bias: Any
    ids: Any
    shift: Any


def inputs_of(case: Case, seed: int = 0) -> Inputs:
    """Arrays whose logits are a few units apart."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(case.rows, case.features))
    kernel = random.normal(size=(case.features, case.width)) / case.features**0.5
    bias = random.normal(size=case.width)
    bias[random.random(case.width) < 0.05] = -np.inf
    ids = random.integers(0, case.size, (case.rows, case.ids))
    bias[ids] = 0
    return Inputs(
        jnp.asarray(hidden, jnp.bfloat16),
        jnp.asarray(kernel, jnp.bfloat16),
        jnp.asarray(bias, jnp.float32) if case.biased else None,
        jnp.asarray(ids, jnp.int32),
        jnp.asarray(random.normal(size=case.rows) + 2, jnp.float32),
    )


def run(case: Case, inputs: Inputs) -> mosaic_gpu.Tiled:
    """What the kernel computes."""
    temperature, scale = (
        None if x is None else jnp.float32(x) for x in (case.temperature, case.scale)
    )
    query = Query(
        inputs.ids[:, 0], jnp.ones(case.rows, bool), tempered_entropy=case.moment
    )
    return mosaic_gpu.multiply_and_sum(
        Product(
            inputs.hidden,
            inputs.kernel,
            inputs.shift,
            bias=inputs.bias,
            scale=scale,
        ),
        Vocabulary(case.size),
        query,
        inputs.ids,
        temperature,
        inputs.shift,
        writes_exponentials=case.writes,
    )


def wanted(case: Case, inputs: Inputs) -> dict[str, Any]:
    """The same, in float64."""
    hidden, kernel, shift = (
        np.asarray(x, float) for x in (inputs.hidden, inputs.kernel, inputs.shift)
    )
    z = hidden @ kernel
    if inputs.bias is not None:
        z = z + np.asarray(inputs.bias, float)
    z = z * (1 if case.scale is None else case.scale)
    z[:, case.size :] = -np.inf
    ids, columns = np.asarray(inputs.ids), np.arange(case.width)
    others = z.copy()
    np.put_along_axis(others, ids, -np.inf, 1)
    relative = others - shift[:, None]
    bounded = np.maximum(relative, -1e30)
    e, at_t = np.exp(relative), np.exp(relative / (case.temperature or 1))
    found = {
        "at_ids": np.take_along_axis(z, ids, 1),
        "largest": others.max(1),
        "before": np.where(columns < ids[:, :1], z, -np.inf).max(1),
        "total": np.where(z == -np.inf, 0, z - shift[:, None]).sum(1),
        "exp_sum": e.sum(1),
        "expected": (e * bounded).sum(1),
    }
    if case.temperature is not None:
        found["tempered"] = at_t.sum(1)
    if case.moment:
        found["tempered_moment"] = (at_t * bounded).sum(1)
    if case.writes:
        found["exponentials"] = e
    return found


def assert_agrees(case: Case, inputs: Inputs, found: mosaic_gpu.Tiled) -> None:
    """Compares what the kernel computes with what it should."""
    tiled = found._asdict()
    got = {**tiled.pop("sums"), **tiled}
    want = wanted(case, inputs)
    assert {name for name, x in got.items() if x is not None} == set(want)
    for name, exact in want.items():
        actual = np.asarray(got[name], float)
        # Sums have 24 bits, but their terms may cancel.
        relative, absolute = 2e-6, 2e-6 * np.abs(exact[np.isfinite(exact)]).max()
        if name == "exponentials":
            relative, absolute = 2**-8, 0
        np.testing.assert_allclose(actual, exact, relative, absolute, err_msg=name)


@pytest.mark.parametrize("haste", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", CASES)
def test_the_compiled_kernel_computes_the_sums(monkeypatch, name, haste):
    """Asynchronous copies and products happen as late as possible, or at once."""
    case = CASES[name]
    inputs = inputs_of(case)
    kernels.executed(monkeypatch, haste=haste, seed=round(10 * haste))
    assert_agrees(case, inputs, run(case, inputs))


@pytest.mark.parametrize("seed", range(3))
def test_in_another_order(monkeypatch, seed):
    case = CASES["eleven ids and a temperature"]._replace(rows=100, width=256, size=256)
    inputs = inputs_of(case, seed)
    kernels.executed(monkeypatch, haste=0.2, seed=seed)
    assert_agrees(case, inputs, run(case, inputs))


def test_a_batch_is_one_kernel(monkeypatch):
    """Under `vmap`, which gives its grid another axis."""
    case = CASES["two steps"]
    inputs = [inputs_of(case, seed) for seed in range(2)]
    inputs = [x._replace(kernel=inputs[0].kernel) for x in inputs]
    batch = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    batch = batch._replace(kernel=inputs[0].kernel)
    axes = Inputs(hidden=0, kernel=None, bias=None, ids=0, shift=0)

    kernels.executed(monkeypatch)
    found = jax.vmap(functools.partial(run, case), (axes,))(batch)
    for number, own in enumerate(inputs):
        one = functools.partial(lambda i, x: x[i], number)
        assert_agrees(case, own, jax.tree.map(one, found))


FAULTS = {
    "fence.proxy.async": "not fenced",
    "bar.sync": "not fenced|unordered|may not exist",
    "mbarrier.try_wait": "never written|more arrivals than expected|still arriving",
    "mbarrier.arrive.release": "all warps wait for ever",
    "wgmma.fence": "registers are not fenced",
    "wgmma.wait_group": "still read asynchronously|is not computed yet",
    "cp.async.bulk.wait_group": "still read asynchronously|is not waited for",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_missing_instruction_is_noticed(monkeypatch, name):
    """Shows that the order of what happens is checked, whatever the result is."""
    case = Case(rows=128, width=256, size=256)

    def without(instruction: Instruction) -> Instruction:
        if not instruction.name.startswith(name):
            return instruction
        if name == "mbarrier.try_wait":
            done = instruction.operands[0], "1"
            return instruction._replace(name="mov.pred", operands=done)
        return instruction._replace(name="setmaxnreg")

    def change(kernel: kernels.Compiled) -> kernels.Compiled:
        changed = [without(x) for x in kernel.program.instructions]
        program = kernel.program._replace(instructions=changed)
        return kernel._replace(program=program)

    kernels.executed(monkeypatch, change)
    with pytest.raises(AssertionError, match=FAULTS[name]):
        run(case, inputs_of(case))

"""Compiling the kernel in Mosaic GPU for an H100, and executing what comes out."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.core import Tracer
from jax.sharding import SingleDeviceSharding

from ava_jax.kernel import mosaic_gpu
from benchmarks import topologies
from support.ptx.machine import run
from support.ptx.program import Launch, Program, parse, parse_host
from support.ptx.state import Block


class Compiled(NamedTuple):
    """A compiled kernel."""

    program: Program
    launch: Launch

    def execute(self, arrays: list[np.ndarray], **how: Any) -> None:
        """Executes it; the last arrays are written to. See `Block` for how."""
        views = [x.reshape(-1).view(np.uint8) for x in arrays]
        for index in np.ndindex(*self.launch.blocks):
            run(Block(self.program, self.launch, views, index, **how))


# The compiler compiles a kernel once, and writes nothing about it the second time.
_COMPILED: dict[str, Compiled] = {}


def compile_kernel(call: Callable[..., Any], arrays: Any) -> Compiled:
    """Returns what a function that calls the kernel once is compiled to."""
    name = str(jax.make_jaxpr(call)(arrays))
    if name not in _COMPILED:
        _COMPILED[name] = _compile(call, arrays)
    return _COMPILED[name]


def _compile(call: Callable[..., Any], arrays: Any) -> Compiled:
    card = SingleDeviceSharding(topologies.devices("h100")[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=card), arrays
    )
    with tempfile.TemporaryDirectory() as folder:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
            patch.setenv("MOSAIC_GPU_DUMP_MLIR_PASSES", "1")
            patch.setenv("MOSAIC_GPU_DUMP_TO", folder)
            topologies.compile_for("h100", call, shapes)
        (program,) = Path(folder).glob("*.ptx")
        (host,) = Path(folder).glob("*.mlir-passes.log")
        return Compiled(parse(program.read_text()), parse_host(host.read_text()))


def unwritten(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """Returns an array all of whose bits are set, so that it holds no numbers."""
    size = np.prod(shape.shape, dtype=int) * shape.dtype.itemsize
    return np.full(size, 0xFF, np.uint8).view(shape.dtype).reshape(shape.shape)


def executed(
    monkeypatch, change: Callable[[Compiled], Compiled] = lambda x: x, **how: Any
) -> None:
    """Makes `multiply_and_sum`, called outside of jit, execute the compiled kernel.

    Args:
      monkeypatch: pytest's.
      change: what is executed in place of the compiled kernel.
      **how: see `Block`.
    """
    real = mosaic_gpu._call

    def execute(call, inputs):
        given = [np.array(x) for x in jax.tree.leaves(inputs)]
        wanted, structure = jax.tree.flatten(jax.eval_shape(call, inputs))
        results = [unwritten(x) for x in wanted]
        change(compile_kernel(call, inputs)).execute(given + results, **how)
        return structure.unflatten([jnp.asarray(x) for x in results])

    def call(vocabulary, query, inputs, out, interpret):
        del interpret

        def own(inputs):
            return real(vocabulary, query, inputs, out, None)

        def batched(size, is_batched, inputs):
            del size
            axes = jax.tree.map(lambda x: 0 if x else None, is_batched[0])
            results = execute(jax.vmap(own, (axes,)), inputs)
            return results, jax.tree.map(lambda x: True, results)

        if not isinstance(inputs.hidden, Tracer):
            return execute(own, inputs)
        of_batch = jax.custom_batching.custom_vmap(own)
        of_batch.def_vmap(batched)
        return of_batch(inputs)

    monkeypatch.setattr(mosaic_gpu, "_call", call)

"""Running the kernel in Mosaic GPU by Pallas's interpreter, which needs no GPU."""

import functools

import jax
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from ava_jax.kernel import mosaic_gpu

_Params = getattr(plgpu, "InterpretGPUParams", None)
# That of JAX 0.11 and newer waits for ever if several devices run a kernel.
RUNS_ON_SEVERAL_DEVICES = _Params is None


def interpret(monkeypatch) -> None:
    """Makes the kernel run by the interpreter, which raises an error at a race."""
    params = _Params(detect_races=True) if _Params else _of_an_older_jax(monkeypatch)
    run = functools.partial(mosaic_gpu.multiply_and_sum, interpret=params)
    monkeypatch.setattr(mosaic_gpu, "multiply_and_sum", run)


def _of_an_older_jax(monkeypatch):
    """That of JAX 0.10 knows no layouts, and no tile that reaches beyond the end."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    call = mosaic_gpu._call

    def with_whole_tiles(vocabulary, query, inputs, out, params):
        wanted = out.exponentials
        if wanted is None:
            return call(vocabulary, query, inputs, out, params)
        tile = mosaic_gpu._TILE_ROWS, mosaic_gpu._COLUMNS
        shape = [
            -(-n // size) * size for n, size in zip(wanted.shape, tile, strict=True)
        ]
        out = out._replace(exponentials=jax.ShapeDtypeStruct(shape, wanted.dtype))
        found = call(vocabulary, query, inputs, out, params)
        rows, columns = wanted.shape
        return found._replace(exponentials=found.exponentials[:rows, :columns])

    def iota(dtype, shape, axis, *, layout):
        return lax.broadcasted_iota(dtype, shape, axis)

    monkeypatch.setattr(plgpu, "layout_cast", lambda x, layout: x)
    monkeypatch.setattr(plgpu, "broadcasted_iota", iota)
    monkeypatch.setattr(mosaic_gpu, "_call", with_whole_tiles)
    return InterpretGPUParams(
        detect_races=True,
        out_of_bounds_reads="uninitialized",
        uninitialized_memory="zero",
    )

"""Other packages' fused losses, compiled for a TPU that need not be present.

`python -m benchmarks.external` compiles each baseline's loss and gradients for one
chip and prints the compiler's estimate of the time and the temporary memory; nothing is
run. `make bench-external` installs the packages, 2.6 GB, and needs Python 3.12, which
tokamax requires.
"""

import argparse
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from jax.stages import Compiled

from benchmarks import baselines, costs, hlo
from benchmarks.shapes import BATCH, Shape
from benchmarks.topologies import CHIPS, compile_for, devices, given

# Hidden states [B, S, D], projection [D, V] and targets [B, S] to the mean loss.
Baseline = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# The second includes the zeros that pad V to a multiple of 2048 in its sums.
TOKAMAX = ("xla", "chunked_xla")
LEVANTER_XLA = ("xla", "xla_fast_bwd")
LEVANTER_MODULE = "levanter.kernels.pallas.fused_cross_entropy_loss"
TOKEN_BLOCKS = (2048, 4096)
# Tokens and vocabulary per block, as Levanter chooses them on a v5p; on a CPU host it
# would use all tokens at once.
V5P_BLOCKS = (1024, 8192)
MIB = 2**20


class Found(NamedTuple):
    """The installed baselines.

    Attributes:
      baselines: by package and implementation.
      skipped: by package, why there is none.
    """

    baselines: dict[str, Baseline]
    skipped: dict[str, str]


def naive_baselines() -> dict[str, Baseline]:
    """Returns the baselines with all logits at once, then Optax in float32."""
    return {"naive": _naive, "naive, float32 logits": _naive_float32}


def external_baselines() -> dict[str, Baseline]:
    """Returns the losses of the installed packages, by package and implementation."""
    return find().baselines


def find() -> Found:
    """Imports the packages; returns their baselines and why others are missing."""
    baselines: dict[str, Baseline] = {}
    skipped: dict[str, str] = {}
    for package, load in {"tokamax": _tokamax, "marin-levanter": _levanter}.items():
        try:
            baselines |= load()
        # A package for a newer Python may use syntax that this one does not know.
        except (ImportError, SyntaxError) as error:
            skipped[package] = f"{error}"
    return Found(baselines, skipped)


def compile_gradient(baseline: Baseline, chip: str, shape: Shape) -> Compiled:
    """Compiles loss and gradients for hidden states and projection, for one device."""
    sharding = SingleDeviceSharding(devices(chip)[0])
    rows = shape.batch, shape.length
    arrays = (
        given((*rows, shape.width), shape.dtype, sharding),
        given((shape.width, shape.vocab), shape.dtype, sharding),
        given(rows, "int32", sharding),
    )
    return compile_for(chip, jax.value_and_grad(baseline, argnums=(0, 1)), *arrays)


def line(name: str, program: Compiled, clock: float) -> str:
    """Returns a baseline's figures as a line of Markdown.

    Args:
      name: the baseline's.
      program: its loss and gradients.
      clock: cycles per nanosecond.
    """
    cycles = costs.estimated_cycles(hlo.parse(str(program.as_text())))
    memory = program.memory_analysis()
    temp = "-" if memory is None else f"{memory.temp_size_in_bytes / MIB:,.0f}"
    return f"| {name} | {cycles / clock / 1e6:,.1f} | {temp} |"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles every baseline and prints the table."""
    clocks = {name: chip.clock for name, chip in CHIPS.items() if chip.clock}
    parser = argparse.ArgumentParser(description="Other packages' losses on a TPU.")
    parser.add_argument("--chip", choices=clocks, default="v5p")
    sizes = BATCH, 4096, 4096, 128256
    parser.add_argument("--sizes", type=int, nargs=4, default=sizes, help="B, S, D, V")
    parser.add_argument("--only", default="", help="a substring of baselines' names")
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    batch, length, width, vocab = options.sizes
    shape = Shape(batch * length, vocab, width, dtype="bfloat16", batch=batch)
    found = find()
    for package, reason in found.skipped.items():
        print(f"without {package}: {reason}")
    print(f"| {shape}, {options.chip} | estimated ms | temp MiB |")
    print("|---|---|---|")
    for name, baseline in (naive_baselines() | found.baselines).items():
        if options.only in name:
            program = compile_gradient(baseline, options.chip, shape)
            print(line(name, program, clocks[options.chip]), flush=True)


def _naive(hidden: jax.Array, lm_head: jax.Array, targets: jax.Array) -> jax.Array:
    return baselines.naive(targets, hidden, lm_head)


def _naive_float32(
    hidden: jax.Array, lm_head: jax.Array, targets: jax.Array
) -> jax.Array:
    logits = jnp.matmul(hidden, lm_head, preferred_element_type=jnp.float32)
    return baselines.optax_loss(targets, logits)


def _flat(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)


def _tokamax() -> dict[str, Baseline]:
    tokamax = importlib.import_module("tokamax")

    def loss(
        implementation: str, hidden: jax.Array, lm_head: jax.Array, targets: jax.Array
    ) -> jax.Array:
        return tokamax.linear_softmax_cross_entropy_loss(
            *_flat(hidden, targets),
            lm_head,
            reduction="mean",
            implementation=implementation,
        )

    return {f"tokamax {name}": functools.partial(loss, name) for name in TOKAMAX}


def _levanter() -> dict[str, Baseline]:
    module = importlib.import_module(LEVANTER_MODULE)
    tokens, vocab = V5P_BLOCKS
    blocks = module.BlockSizes(b_block_size=tokens, v_block_size=vocab)
    found: dict[str, Baseline] = {
        f"levanter grad_in_forward {size}": functools.partial(
            _levanter_in_forward, module, size
        )
        for size in TOKEN_BLOCKS
    }
    for name in LEVANTER_XLA:
        streaming = functools.partial(_levanter_streaming, module, name)
        found[f"levanter {name}"] = functools.partial(streaming, None)
        found[f"levanter {name}, v5p blocks"] = functools.partial(streaming, blocks)
    return found


def _levanter_in_forward(
    module: Any,
    tokens: int,
    hidden: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    states, labels = _flat(hidden, targets)
    return module.linear_softmax_cross_entropy_weighted_sum(
        states,
        labels,
        lm_head,
        jnp.full(labels.shape, 1 / labels.size, jnp.float32),
        logsumexp_weight=None,
        token_block_size=tokens,
    )


def _levanter_streaming(
    module: Any,
    implementation: str,
    blocks: object,
    hidden: jax.Array,
    lm_head: jax.Array,
    targets: jax.Array,
) -> jax.Array:
    return module.fused_cross_entropy_loss_and_logsumexp_penalty(
        *_flat(hidden, targets),
        lm_head,
        reduction="mean",
        implementation=implementation,
        block_sizes=blocks,
    )


if __name__ == "__main__":
    main()

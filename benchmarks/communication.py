"""The communication of compiled programs: `python -m benchmarks.communication`.

Nothing is run, so the sizes are those of a real model, on eight fake CPU devices. Each
row is the gradient of one loss for hidden states and `lm_head` on one mesh.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Compiled

import ava_jax
from benchmarks import baselines
from benchmarks.hlo import collectives
from benchmarks.machine import versions

DEVICES = 8
BATCH, LENGTH, WIDTH, VOCAB = 8, 1024, 1024, 131072
MESHES: tuple[dict[str, int], ...] = (
    {"data": 8, "tensor": 1},
    {"data": 2, "tensor": 4},
    {"data": 1, "tensor": 8},
    {"data": 2, "sequence": 2, "tensor": 2},
)
# Tokens of each row at a time, as on an accelerator.
CHUNK = 128
MIB = 2**20
WITH_MESH = "everything, with mesh="
WITHOUT_MESH = "everything, without mesh="
NAIVE = "naive, plain"

Loss = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Row(TypedDict):
    """One loss on one mesh, with the bytes that one device passes to collectives.

    Attributes:
      mesh: the sizes of its axes.
      loss: the name of the loss.
      token_bytes: per token of the device, without the projection's gradient.
      projection_bytes: for the projection's gradient.
      projection_times: the number of collectives of the projection's gradient.
      calls: the number of all collectives.
      temp_bytes: temporary memory per device.
    """

    mesh: dict[str, int]
    loss: str
    token_bytes: float
    projection_bytes: int
    projection_times: int
    calls: int
    temp_bytes: int | None


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles every loss on every mesh, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--vocab", type=int, default=VOCAB)
    options = parser.parse_args(arguments)
    rows = []
    print("| mesh | loss | B per token | MiB of dW | calls | temp MiB |")
    print("|---|---|---|---|---|---|")
    for sizes in MESHES:
        for name, loss in losses(sizes, options.vocab).items():
            rows.append(measure(sizes, name, loss, options.width, options.vocab))
            print(line(rows[-1]))
    path = options.out / f"communication-jax{jax.__version__}.json"
    shape = [BATCH, LENGTH, options.width, options.vocab]
    record = {"shape": shape, "versions": versions(), "rows": rows}
    path.write_text(json.dumps(record, indent=1) + "\n")


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """Returns a mesh whose shardings XLA propagates."""
    automatic = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=automatic)


def losses(sizes: dict[str, int], vocab: int) -> dict[str, Loss]:
    """Returns the losses by name."""
    config = ava_jax.UnifiedLossConfig(
        vocab_size=vocab,
        eos_token_id=vocab - 1,
        z_loss_weight=1e-4,
        chunk_size=CHUNK,
        block_size=CHUNK,
    )
    on_mesh = ava_jax.unified_loss(
        config,
        mesh=make_mesh(sizes),
        batch_axes="data",
        sequence_axis="sequence" if "sequence" in sizes else None,
        vocab_axis="tensor",
    )

    def everything(loss_fn: ava_jax.UnifiedLoss) -> Loss:
        def loss(targets: jax.Array, hidden: jax.Array, head: jax.Array) -> jax.Array:
            total, _, _ = loss_fn(
                loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
            )
            return total

        return loss

    return {
        WITH_MESH: everything(on_mesh),
        WITHOUT_MESH: everything(ava_jax.unified_loss(config)),
        NAIVE: baselines.naive,
    }


def compile_gradient(
    sizes: dict[str, int], loss: Loss, width: int, columns: int
) -> Compiled:
    """Compiles the gradient for hidden states and `lm_head` [width, columns]."""
    mesh = make_mesh(sizes)
    rows = ("data", "sequence") if "sequence" in sizes else ("data", None)

    def sharding(*axes: str | None) -> NamedSharding:
        return NamedSharding(mesh, P(*axes))

    def given(
        shape: tuple[int, ...], dtype: jnp.dtype, *axes: str | None
    ) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(*axes))

    arrays = (
        given((BATCH, LENGTH), jnp.dtype("int32"), *rows),
        given((BATCH, LENGTH, width), jnp.dtype("float32"), *rows),
        given((width, columns), jnp.dtype("float32"), None, "tensor"),
    )
    out = (sharding(), (sharding(*rows), sharding(None, "tensor")))
    step = jax.jit(jax.value_and_grad(loss, argnums=(1, 2)), out_shardings=out)
    return step.lower(*arrays).compile()


def measure(
    sizes: dict[str, int], name: str, loss: Loss, width: int, vocab: int
) -> Row:
    """Compiles the gradient and reads the figures of its program."""
    program = compile_gradient(sizes, loss, width, vocab)
    found = collectives(str(program.as_text()))
    columns = vocab // sizes["tensor"]
    projection = [c for c in found if columns in c.shape]
    others = sum(c.size * c.times for c in found if columns not in c.shape)
    memory = program.memory_analysis()
    return Row(
        mesh=sizes,
        loss=name,
        token_bytes=others / (BATCH * LENGTH * sizes["tensor"] / DEVICES),
        projection_bytes=sum(c.size * c.times for c in projection),
        projection_times=sum(c.times for c in projection),
        calls=sum(c.times for c in found),
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
    )


def line(row: Row) -> str:
    """Returns the row as Markdown."""
    mesh = ", ".join(f"{name}={size}" for name, size in row["mesh"].items())
    temp = row["temp_bytes"]
    cells = (
        mesh,
        row["loss"],
        f"{row['token_bytes']:,.0f}",
        f"{row['projection_bytes'] / MIB:,.0f}",
        f"{row['calls']:,}",
        "-" if temp is None else f"{temp / MIB:,.0f}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()

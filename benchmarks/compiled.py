"""Programs for accelerators that need not be present: `python -m benchmarks.compiled`.

Compiles the loss and its baselines for one chip, or for a mesh of hundreds, and prints
their temporary memory, and the compiler's estimate of the time on TPUs or the bytes
that the kernels move on GPUs. These are properties of the programs and estimates, not
measured times.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import costs, hlo
from benchmarks.machine import versions
from benchmarks.plots import plot_compiled
from benchmarks.programs import (
    NAIVE,
    ROW_AXES,
    Entry,
    devices_of,
    entries,
    posttraining_entries,
)
from benchmarks.records import CompiledRecord, CompiledRow, CostRecord
from benchmarks.shapes import COMPILED, Shape
from benchmarks.topologies import CHIPS, compile_for

DEFAULT_SHAPES = {"v5e": "gpt2-medium", "v6e": "qwen3-4b"}
FLAGS = ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
GIB, MIB = 2**30, 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the selected programs, prints the table and writes it."""
    options = parse(arguments)
    chip, mesh, shape = options.chip, options.mesh, options.sizes
    rows: list[CompiledRow] = []
    print(head(chip, shape, mesh), flush=True)
    table = posttraining_entries if options.post_training else entries
    for entry in table(shape, devices_of(chip, mesh)):
        if all(part not in entry.name for part in options.only or [""]):
            continue
        rows.append(measure(chip, entry, options.top))
        print(line(rows[-1], rows), flush=True)
    for row in rows if options.top else ():
        print(f"\n{row['name']}:\n{costliest(row, chip)}")
    where = f"-{'-'.join(f'{k}{v}' for k, v in mesh.items())}" if mesh else ""
    where += "-post-training" if options.post_training else ""
    name = f"compiled-{chip}-{options.shape}{where}-jax{jax.__version__}"
    path = options.out / f"{name}.json"
    record = _merged(path, _record(options, rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot:
        plot_compiled(record, path.with_suffix(".png"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; `sizes` is the shape, scaled to the mesh."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compiled", description=__doc__
    )
    parser.add_argument("--chip", choices=CHIPS, default="v5p")
    parser.add_argument(
        "--shape",
        help=f"one of {', '.join(COMPILED)}, a micro-batch per shard of the rows; or "
        "BxSxDxV of the whole batch; default: the chip's",
    )
    parser.add_argument(
        "--mesh", type=_mesh, default={}, help="such as data=4,fsdp=4,tensor=2"
    )
    parser.add_argument(
        "--post-training",
        action="store_true",
        help="log-probabilities and GRPO instead; of one device",
    )
    parser.add_argument("--only", nargs="+", help="substrings of the entries' names")
    parser.add_argument("--top", type=int, default=0, help="print costliest operations")
    parser.add_argument("--plot", action="store_true", help="draw time against memory")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    options.shape = options.shape or DEFAULT_SHAPES.get(options.chip, "llama3-8b")
    try:
        options.sizes = read_shape(options.shape, options.mesh)
    except ValueError as error:
        parser.error(str(error))
    if options.post_training and options.mesh:
        parser.error("--post-training is for one device: leave out --mesh")
    return options


def _mesh(text: str) -> dict[str, int]:
    pairs = [part.split("=") for part in text.split(",")]
    if any(len(pair) != 2 or not pair[1].isdecimal() for pair in pairs):
        raise argparse.ArgumentTypeError(f"must be like data=4,tensor=2, got {text!r}")
    return {name: int(size) for name, size in pairs}


def read_shape(text: str, mesh: dict[str, int]) -> Shape:
    """Returns the shape of a name, times the mesh's shards of the rows, or of sizes.

    Raises:
      ValueError: the text is neither.
    """
    if text in COMPILED:
        shape, parts = COMPILED[text], 1
        for axis in ROW_AXES:
            parts *= mesh.get(axis, 1)
        batch, length = shape.batch * parts, shape.length
        return Shape(batch * length, shape.vocab, shape.width, "bfloat16", batch)
    sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)", text)
    if not sizes:
        names = ", ".join(COMPILED)
        raise ValueError(f"--shape must be BxSxDxV or one of {names}, got {text!r}")
    batch, length, width, vocab = map(int, sizes.groups())
    return Shape(batch * length, vocab, width, "bfloat16", batch)


# Measuring -----------------------------------------------------------------------


def measure(chip: str, entry: Entry, top: int = 0) -> CompiledRow:
    """Compiles an entry and reads the figures of its program, or why it failed."""
    row = CompiledRow(name=entry.name, kind=entry.kind, reference=entry.reference)
    start = time.perf_counter()
    try:
        compiled = compile_for(
            chip, entry.step, *entry.arguments, out_shardings=entry.out_shardings()
        )
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        row["failed"] = _reason(error)
        return row
    row["compile_seconds"] = round(time.perf_counter() - start, 1)
    program = hlo.parse(str(compiled.as_text()))
    if loops := hlo.unknown_loops(program):
        names = ", ".join(loops)
        print(f"{entry.name}: unknown trip count, counted once: {names}", flush=True)
    clock = CHIPS[chip].clock
    if clock:
        row["estimated_ms"] = costs.estimated_cycles(program) / clock / 1e6
    else:
        row["moved_bytes"] = costs.moved_bytes(program)
        row["outside_bytes"] = costs.moved_bytes(program, by_products=False)
    memory = compiled.memory_analysis()
    if memory is not None:
        row["temp_bytes"] = memory.temp_size_in_bytes
    by = "cycles" if clock else "bytes"
    row["costliest"] = [
        CostRecord(**cost._asdict()) for cost in costs.costliest(program, top, by=by)
    ]
    return row


def _reason(error: Exception) -> str:
    """Returns the reason of a compiler error in one line."""
    text = str(error)
    used = re.search(r"Used (\S+) of (\S+) hbm", text)
    if used:
        return f"does not fit: {used[1]} of {used[2]}"
    return text.splitlines()[0][:120]


def _record(options: argparse.Namespace, rows: list[CompiledRow]) -> CompiledRecord:
    shape: Shape = options.sizes
    return {
        "chip": options.chip,
        "shape": [shape.batch, shape.length, shape.width, shape.vocab],
        "mesh": options.mesh,
        "versions": versions(),
        "flags": {name: os.environ[name] for name in FLAGS if name in os.environ},
        "rows": rows,
    }


def _merged(path: Path, record: CompiledRecord) -> CompiledRecord:
    """Returns the record, with the file's rows that were not compiled again."""
    if not path.exists():
        return record
    old: CompiledRecord = json.loads(path.read_text())
    rows = {row["name"]: row for row in [*old["rows"], *record["rows"]]}
    return {**record, "rows": list(rows.values())}


# Printing ------------------------------------------------------------------------


def head(chip: str, shape: Shape, mesh: dict[str, int]) -> str:
    """Returns the title and the head of the table."""
    where = "".join(f", {name}={size}" for name, size in mesh.items())
    sizes = f"{shape.batch}x{shape.length} tokens, D {shape.width}, V {shape.vocab}"
    amount, outside = "estimated ms", ""
    if not CHIPS[chip].clock:
        amount, outside = "GiB moved", " (outside products)"
    cells = ("", amount + outside, "temp MiB", f"{amount} ÷", "temp ÷", "compile s")
    title = f"{chip}{where}: {sizes}, bfloat16, jax {jax.__version__}"
    return f"{title}\n\n| {' | '.join(cells)} |\n|{'---|' * len(cells)}"


def line(row: CompiledRow, rows: list[CompiledRow]) -> str:
    """Returns the row as Markdown, with its ratios to its baseline."""
    if "failed" in row:
        return f"| {row['name']} | {row['failed']} | | | | |"
    base = next((r for r in rows if r["name"] == row["reference"]), None)
    amount, temp = amount_of(row), row.get("temp_bytes")
    outside = row.get("outside_bytes")
    outside = "" if outside is None else f" ({_number(outside / GIB)})"
    against = f" (÷ {row['reference']})" if row["reference"] != NAIVE else ""
    cells = (
        row["name"],
        "-" if amount is None else _number(amount) + outside,
        "-" if temp is None else f"{temp / MIB:,.0f}",
        _ratio(amount, base and amount_of(base)) + against,
        _ratio(temp, base and base.get("temp_bytes")),
        f"{row.get('compile_seconds', 0):.0f}",
    )
    return f"| {' | '.join(cells)} |"


def amount_of(row: CompiledRow) -> float | None:
    """Returns the estimated milliseconds or the GiB moved."""
    moved = row.get("moved_bytes")
    return row.get("estimated_ms") if moved is None else moved / GIB


def _number(amount: float) -> str:
    return f"{amount:,.{1 if amount >= 10 else 2}f}"


def _ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}" if own is not None and other else "-"


def costliest(row: CompiledRow, chip: str) -> str:
    """Returns the most expensive operations, one per line."""
    clock = CHIPS[chip].clock
    unit, scale = ("ms", clock * 1e6) if clock else ("GiB", GIB)
    return "\n".join(
        f"  {cost['amount'] / scale:9.2f} {unit}  {cost['kind']} {cost['result']} "
        f"{cost['source'][-80:]}"
        for cost in row.get("costliest", [])
    )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()

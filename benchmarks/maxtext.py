"""MaxText with our loss in it, by the adapter `examples/maxtext_loss.py`.

    python -m benchmarks.maxtext own tiling plain everything
    python -m benchmarks.maxtext train

MaxText's ahead-of-time compiler compiles Llama-3.1-8B's step for a v5p-64, 32 chips
that need not be present, with one of four losses: MaxText's own, its vocabulary tiling,
or ours in place of that tiling, plain or with everything. The compiler's estimate of
the time and the temporary memory per chip are printed; nothing is run. It takes one to
two minutes each.

`train` trains a tiny model with MaxText's loss, with its tiling and with ours, and
prints by how much the metrics differ, in three minutes. `make bench-maxtext` does both
and saves the figures in `benchmarks/results`; it needs Python 3.12 and 4 GB of
packages.
"""

import argparse
import importlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TypedDict
from unittest import mock

import jax
from jax.stages import Compiled

from benchmarks import costs, hlo, machine, maxtext_training
from benchmarks.maxtext_training import Options, Settings, Training
from benchmarks.topologies import CHIPS, ENVIRONMENT

OPTIONS: Mapping[str, Options] = {
    "plain": maxtext_training.PLAIN,
    "everything": maxtext_training.EVERYTHING,
}
LOSSES = ("own", "tiling", *OPTIONS)
# The z-loss is a setting of MaxText, whichever loss computes it.
MORE_SETTINGS = {"everything": {"z_loss_multiplier": 1e-4}}
CHIP = "v5p"
SETTINGS: Settings = {
    "model_name": "llama3.1-8b",
    "compile_topology": f"{CHIP}-64",
    "compile_topology_num_slices": 1,
    "per_device_batch_size": 4,
    "max_target_length": 4096,
    "attention": "flash",
}
GIB = 2**30


class Step(TypedDict):
    """A compiled training step, with the memory of one chip.

    Attributes:
      estimated_ms: estimate of the TPU's compiler.
      temp_bytes: temporary memory.
      argument_bytes: memory of the state and the batch.
      compile_seconds: time to trace and compile.
      settings: MaxText's settings that differ from its defaults.
      versions: versions of the packages.
    """

    estimated_ms: float
    temp_bytes: int
    argument_bytes: int
    compile_seconds: float
    settings: dict[str, str | int | float]
    versions: dict[str, str | None]


def compile_step(loss: str, settings: Settings) -> Compiled:
    """Compiles MaxText's training step.

    Args:
      loss: one of `LOSSES`.
      settings: MaxText's settings; the others keep their defaults.
    """
    compiler = importlib.import_module(f"{maxtext_training.PRE_TRAIN}.train_compile")
    compiled: list[Compiled] = []
    real = compiler.jit_and_compile

    def jit_and_compile(*args: object, **kwargs: object) -> Compiled:
        compiled.append(real(*args, **kwargs))
        return compiled[-1]

    with mock.patch.object(compiler, "jit_and_compile", jit_and_compile):
        maxtext_training.run("train_compile", settings, OPTIONS.get(loss))
    return compiled[0]


def measure(loss: str, extra: Settings) -> Step:
    """Compiles a step and reads the figures of its program.

    Args:
      loss: one of `LOSSES`.
      extra: MaxText's settings that override `SETTINGS`.
    """
    tiles = 1 if loss == "own" else maxtext_training.TILES
    own = {"num_vocab_tiling": tiles, **MORE_SETTINGS.get(loss, {})}
    settings = {**SETTINGS, **own, **extra}
    start = time.perf_counter()
    program = compile_step(loss, settings)
    seconds = time.perf_counter() - start
    cycles = costs.estimated_cycles(hlo.parse(str(program.as_text())))
    memory = program.memory_analysis()
    clock = CHIPS[CHIP].clock
    assert memory is not None
    assert clock is not None
    return Step(
        estimated_ms=cycles / clock / 1e6,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        compile_seconds=seconds,
        settings=settings,
        versions={
            **machine.versions(),
            **{name: metadata.version(name) for name in ("maxtext", "libtpu")},
        },
    )


def keep(path: Path, name: str, figures: Step | Training) -> None:
    """Writes figures to a results file and keeps the file's others."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**old, name: figures}, indent=1) + "\n")


def compile_steps(losses: Sequence[str], extra: Settings, out: Path) -> None:
    """Compiles the steps of the named losses, prints and saves their figures."""
    for loss in losses:
        step = measure(loss, extra)
        keep(out / f"maxtext-{metadata.version('maxtext')}.json", loss, step)
        print(
            f"{loss}: estimated {step['estimated_ms']:,.1f} ms, temporaries of a chip "
            f"{step['temp_bytes'] / GIB:.2f} GiB, compiled in "
            f"{step['compile_seconds']:.0f} s",
            flush=True,
        )


def train_cases(extra: Settings, out: Path) -> None:
    """Trains every case with both losses, prints and saves what differs."""
    path = out / f"maxtext-training-{metadata.version('maxtext')}.json"
    for name, settings in maxtext_training.CASES.items():
        training = maxtext_training.compare({**settings, **extra})
        keep(path, name, training)
        first, last = training["losses"]
        print(f"{name}: loss {first:.3f} to {last:.3f}", flush=True)
        for loss, gaps in (
            ("ours", training["gaps"]),
            ("tiling", training["tiling_gaps"]),
        ):
            figures = ", ".join(f"{metric} {gap:.1e}" for metric, gap in gaps.items())
            print(f"  {loss}: {figures}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles steps, or trains; prints and saves the figures."""
    parser = argparse.ArgumentParser(description="Our loss in MaxText.")
    parser.add_argument("what", nargs="+", choices=(*LOSSES, "train"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--set", nargs="*", default=(), metavar="NAME=VALUE", help="MaxText's settings"
    )
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", maxtext_training.DEVICES)
    maxtext_training.use_one_order()
    # MaxText connects to Google Cloud when it is imported, unless this is set.
    for name, value in {**ENVIRONMENT, "DECOUPLE_GCLOUD": "TRUE"}.items():
        os.environ.setdefault(name, value)
    extra = dict(setting.split("=", 1) for setting in options.set)
    compile_steps([w for w in options.what if w != "train"], extra, options.out)
    if "train" in options.what:
        train_cases(extra, options.out)


if __name__ == "__main__":
    main()

"""MaxText's training step with our loss in it: `python -m benchmarks.maxtext own`.

MaxText's ahead-of-time compiler compiles Llama-3.1-8B's step for a v5p-64, 32 chips
that need not be present, with one of four losses: MaxText's own, its vocabulary tiling,
or ours in place of that tiling, plain or with everything. The compiler's estimate of
the time and the temporary memory per chip are printed and saved in
`benchmarks/results`; nothing is run. `make bench-maxtext` compiles all four in one to
two minutes each; it needs Python 3.12 and 4 GB of packages.
"""

import argparse
import importlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypedDict
from unittest import mock

import jax
import jax.numpy as jnp
from jax.stages import Compiled

import ava_jax
from benchmarks import candidates, costs, hlo, machine
from benchmarks.topologies import CHIPS, ENVIRONMENT

LOSSES = ("own", "tiling", "plain", "everything")
CONFIGS = {"plain": candidates.plain, "everything": candidates.everything}
TILES = 8
CHIP = "v5p"
SETTINGS: Mapping[str, str | int] = {
    "model_name": "llama3.1-8b",
    "compile_topology": f"{CHIP}-64",
    "compile_topology_num_slices": 1,
    "per_device_batch_size": 4,
    "max_target_length": 4096,
    "attention": "flash",
    "dataset_type": "synthetic",
    "enable_checkpointing": "false",
    "jax_cache_dir": "",
    "run_name": "benchmark",
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
    settings: dict[str, str | int]
    versions: dict[str, str | None]


class Settings(Protocol):
    """The used part of MaxText's config."""

    vocab_size: int


# From a model, its last hidden states [B, S, D], the batch, the config and whether it
# trains to the sums of the loss and of the z-loss over the tokens.
Hook = Callable[
    [Any, jax.Array, Mapping[str, jax.Array], Settings, bool],
    tuple[jax.Array, jax.Array],
]


def hook(config: Callable[[int], ava_jax.UnifiedLossConfig]) -> Hook:
    """Returns our loss with the signature of MaxText's vocabulary tiling.

    Args:
      config: returns the loss's config for a vocabulary size.
    """

    nnx = importlib.import_module("flax.nnx")

    def loss(
        model: Any,
        hidden_states: jax.Array,
        data: Mapping[str, jax.Array],
        settings: Settings,
        is_train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        del is_train
        # Both gradients of the norm are computed before those of the layers. Otherwise
        # XLA keeps the operands of the scale's gradient until the end. Tiling has the
        # norm in its own gradient.
        norm, scale = nnx.split(model.decoder.decoder_norm)
        hidden_states, scale = jax.lax.optimization_barrier((hidden_states, scale))
        hidden = nnx.merge(norm, scale)(hidden_states)
        head = model.decoder.logits_dense.kernel[...].astype(hidden.dtype)
        loss_fn = ava_jax.unified_loss(
            config(settings.vocab_size), mesh=model.mesh, batch_axes=("data", "fsdp")
        )
        unmasked = data["targets_segmentation"] != 0
        mean, _, _ = loss_fn(
            loss_fn.init(),
            targets=data["targets"],
            attention_mask=unmasked,
            hidden_states=hidden,
            lm_head=head,
        )
        return mean * unmasked.sum(), jnp.zeros(())

    return loss


def compile_step(loss: str, settings: Mapping[str, str | int]) -> Compiled:
    """Compiles MaxText's training step.

    Args:
      loss: one of `LOSSES`.
      settings: MaxText's settings; the others keep their defaults.
    """
    maxtext = importlib.import_module("maxtext")
    trainers = "maxtext.trainers.pre_train"
    compiler = importlib.import_module(f"{trainers}.train_compile")
    train = importlib.import_module(f"{trainers}.train")
    compiled: list[Compiled] = []
    real = compiler.jit_and_compile

    def jit_and_compile(*args: object, **kwargs: object) -> Compiled:
        compiled.append(real(*args, **kwargs))
        return compiled[-1]

    tiling = train.vocab_tiling_nnx_loss
    tiling = hook(CONFIGS[loss]) if loss in CONFIGS else tiling
    base = Path(maxtext.__path__[0]) / "configs" / "base.yml"
    with (
        tempfile.TemporaryDirectory() as out,
        mock.patch.object(compiler, "jit_and_compile", jit_and_compile),
        mock.patch.object(train, "vocab_tiling_nnx_loss", tiling),
    ):
        given = [f"{name}={value}" for name, value in settings.items()]
        compiler.main(["", str(base), f"base_output_directory={out}", *given])
    return compiled[0]


def measure(loss: str, extra: Mapping[str, str | int]) -> Step:
    """Compiles a step and reads the figures of its program.

    Args:
      loss: one of `LOSSES`.
      extra: MaxText's settings that override `SETTINGS`.
    """
    tiles = 1 if loss == "own" else TILES
    settings = {**SETTINGS, "num_vocab_tiling": tiles, **extra}
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


def keep(path: Path, loss: str, step: Step) -> None:
    """Writes a step to a results file and keeps the file's other losses."""
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**old, loss: step}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles the steps of the named losses, prints and saves their figures."""
    parser = argparse.ArgumentParser(description="Our loss in MaxText's step.")
    parser.add_argument("losses", nargs="+", choices=LOSSES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--set", nargs="*", default=(), metavar="NAME=VALUE", help="MaxText's settings"
    )
    options = parser.parse_args(arguments)
    jax.config.update("jax_platforms", "cpu")
    # MaxText connects to Google Cloud when it is imported, unless this is set.
    for name, value in {**ENVIRONMENT, "DECOUPLE_GCLOUD": "TRUE"}.items():
        os.environ.setdefault(name, value)
    extra = dict(setting.split("=", 1) for setting in options.set)
    path = options.out / f"maxtext-{metadata.version('maxtext')}.json"
    for loss in options.losses:
        step = measure(loss, extra)
        keep(path, loss, step)
        print(
            f"{loss}: estimated {step['estimated_ms']:,.1f} ms, temporaries of a chip "
            f"{step['temp_bytes'] / GIB:.2f} GiB, compiled in "
            f"{step['compile_seconds']:.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

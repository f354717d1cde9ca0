"""Running the trainer in tests, here and in processes of its own; reading its files."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from support import compiling

from train_tpu import main, make_train_step
from trainer.report.metrics import Record, read_records
from trainer.run import launch_local
from trainer.run.compile_for import make_plan
from trainer.run.devices import make_mesh
from trainer.run.settings import make_loss_config, parse_settings

EXAMPLES = Path(__file__).parents[2] / "examples"
TWO_LAYERS = ("--model.layers", "2")  # of the preset moe: the first has no experts


def with_flags(tiny: list[str], *flags: str) -> list[str]:
    """The tiny run's flags; later flags win."""
    taken = {flag for flag in flags if flag.startswith("--")}
    kept = [
        part
        for name, value in zip(tiny[::2], tiny[1::2], strict=True)
        if name not in taken
        for part in (name, value)
    ]
    return [*kept, *flags]


def train(
    tiny: list[str], out: Path, *flags: str, preset: str = "demo"
) -> list[Record]:
    """Runs the trainer in this process and returns its metrics."""
    sizes = TWO_LAYERS if preset == "moe" else ()
    own = with_flags(tiny, *sizes, *flags)
    arguments = ["--preset", preset, "--out", str(out), *own]
    assert main(arguments) == 0
    return read_records(out / "metrics.jsonl")


def names_of_metrics(arguments: list[str]) -> tuple[str, ...]:
    """The metrics of a step; nothing is compiled or run."""
    settings, fields = parse_settings(arguments)
    size = settings.vocab_size
    loss = make_loss_config(settings, fields, size, size - 1)
    mesh = make_mesh(settings.mesh, settings.batch_size)
    plan = make_plan(settings, loss, make_train_step, mesh)
    _, metrics = jax.eval_shape(plan.step, plan.state, plan.batch)
    return metrics.names


def checkpoint(out: Path, step: int) -> tuple[dict[str, object], object]:
    """The arrays and the data state of a checkpoint."""
    folder = out.resolve() / "checkpoints" / f"step_{step:08d}"
    state = ocp.StandardCheckpointer().restore(folder / "state")
    return state, json.loads((folder / "data" / "metadata").read_text())


def random_params(
    model: nn.Module, inputs: object, size: float = 0.4, seed: int = 0
) -> optax.Params:
    """Normal parameters around where they begin, none of which are 0.

    They are made here, because compiling an initialization takes longer than a test.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    rng = np.random.default_rng(seed)

    def draw(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        center = 1.0 if name == "scale" else 0.0
        return jnp.asarray(rng.normal(center, size, leaf.shape).astype(leaf.dtype))

    return jax.tree.map_with_path(draw, shapes)


def without_seconds(records: list[Record]) -> list[Record]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def assert_close(
    left: list[Record], right: list[Record], rtol: float, atol: float = 1e-5
) -> None:
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert one.keys() == two.keys()
        for name in one:
            if name != "seconds":
                np.testing.assert_allclose(
                    one[name], two[name], rtol=rtol, atol=atol, err_msg=name
                )


def environment(
    cache: Path, devices: int = 1, *, is_quick: bool = True
) -> dict[str, str]:
    """That of a process of its own: its devices, and compiled programs from `cache`.

    Unless `is_quick`, it compiles as users do where that is not switched off otherwise.
    """
    flags = f"--xla_force_host_platform_device_count={devices}"
    if is_quick and compiling.QUICK in os.environ["XLA_FLAGS"]:
        flags += f" {compiling.QUICK}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": flags,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    arguments: list[str], cache: Path, devices: int = 1, processes: int = 1
) -> subprocess.Popen[str]:
    """Starts the trainer, by the launcher if there are several processes."""
    script = [str(EXAMPLES / "train_tpu.py")]
    if processes > 1:
        script = [launch_local.__file__, str(processes)]
    return subprocess.Popen(
        [sys.executable, *script, *arguments],
        env=environment(cache, devices),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(
    is_so: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 240
) -> None:
    """Returns when it is so, or when the process has ended."""
    deadline = time.monotonic() + seconds
    while not is_so() and process.poll() is None:
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.005)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0

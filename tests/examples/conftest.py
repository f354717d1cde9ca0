"""What the tests of the trainer share: its text, its flags, its compiled programs."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from run_helpers import train
from texts import make_text

import ava_jax
import train_tpu
from trainer.model.language_model import LanguageModel
from trainer.model.layers import Batch
from trainer.report import finish
from trainer.report.metrics import Metrics
from trainer.run.settings import Settings
from trainer.run.state import TrainState

DRAW, MAKE_STEP = finish.plot_losses, train_tpu.make_train_step
INIT, SHAPES = train_tpu.init_sharded, train_tpu.state_shapes
Others = tuple[LanguageModel, ava_jax.UnifiedLoss, Mesh]
Parts = tuple[Settings, *Others]
# Settings that say where a run is and how long it goes on, which no step depends on.
OF_THE_RUN = {
    "out": Path(),
    "steps": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "keep": 1,
    "max_skipped_steps": 0,
    "sample_tokens": 0,
}


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Optax's Adam raises a Python float to an int32 power, which strict refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder for compiled programs, shared by all runs here."""
    return tmp_path_factory.getbasetemp().parent / "xla"


@pytest.fixture(scope="module", autouse=True)
def keep_programs(programs: Path) -> Iterator[None]:
    """Many runs here compile the same step: once.

    Afterwards nothing may come out of the cache: programs for several devices can then
    wait for each other for ever on a CPU.
    """
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def module_patch() -> Iterator[pytest.MonkeyPatch]:
    """Replaces attributes for all tests of a module."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


class SharedStep:
    """A train step that is compiled once and outlives the caches of a module."""

    def __init__(self, step: jax.stages.Wrapped) -> None:
        self._step = step
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if self._compiled is None:
            self._compiled = self._step.lower(state, batch).compile()
        return self._compiled(state, batch)


class Shared:
    """The steps and the first states of all runs here, by what they depend on."""

    def __init__(self) -> None:
        self._steps: dict[Parts, SharedStep] = {}
        self._states: dict[Parts, tuple[TrainState, TrainState]] = {}
        self._shapes: dict[Parts, TrainState] = {}

    def make_step(self, settings: Settings, *others: *Others) -> train_tpu.TrainStep:
        parts = dataclasses.replace(settings, **OF_THE_RUN), *others
        if parts not in self._steps:
            step = cast(jax.stages.Wrapped, MAKE_STEP(*parts))
            self._steps[parts] = SharedStep(step)
        return self._steps[parts]

    def init(self, settings: Settings, *others: *Others) -> TrainState:
        parts = dataclasses.replace(settings, **OF_THE_RUN), *others
        if parts not in self._states:
            state = INIT(*parts)
            # A step takes the arrays that it is given; these stay.
            arrays = jax.tree.map(np.array, state)
            self._states[parts] = arrays, jax.tree.map(lambda x: x.sharding, state)
        return jax.device_put(*self._states[parts])

    def shapes(self, settings: Settings, *others: *Others) -> TrainState:
        parts = dataclasses.replace(settings, **OF_THE_RUN), *others
        if parts not in self._shapes:
            self._shapes[parts] = SHAPES(*parts)
        return self._shapes[parts]


SHARED = Shared()


@pytest.fixture(scope="module", autouse=True)
def share_steps(module_patch: pytest.MonkeyPatch) -> None:
    """Runs with the same step trace it once, and begin by the same arrays."""
    module_patch.setattr(train_tpu, "make_train_step", SHARED.make_step)
    module_patch.setattr(train_tpu, "init_sharded", SHARED.init)
    module_patch.setattr(train_tpu, "state_shapes", SHARED.shapes)


@pytest.fixture
def own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run makes step and state from all of its settings, as for users."""
    monkeypatch.setattr(train_tpu, "make_train_step", MAKE_STEP)
    monkeypatch.setattr(train_tpu, "init_sharded", INIT)
    monkeypatch.setattr(train_tpu, "state_shapes", SHAPES)


@pytest.fixture(scope="module", autouse=True)
def draw_nothing(module_patch: pytest.MonkeyPatch) -> None:
    """Leaves the picture of a run empty: to draw it takes as long as to train."""

    def draw(records: object, heldout: object, path: Path) -> None:
        path.write_bytes(b"")

    module_patch.setattr(finish, "plot_losses", draw)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws the picture of a run."""
    monkeypatch.setattr(finish, "plot_losses", DRAW)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve small documents."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(make_text(200, seed=number))
    return folder


@pytest.fixture(scope="module")
def demo_run(
    tiny: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    keep_programs: None,
    share_steps: None,
    draw_nothing: None,
) -> Path:
    """A finished run of twenty steps with two checkpoints, to be read only."""
    out = tmp_path_factory.getbasetemp() / "demo_run"
    if not out.exists():
        # Optax's Adam raises a Python float to an int32 power, which strict refuses.
        with jax.numpy_dtype_promotion("standard"):
            train(tiny, out, "--steps", "20", "--checkpoint-every", "10")
    return out


@pytest.fixture(scope="session")
def tiny(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run of a few seconds; --out and --preset are up to the test."""
    loss = tmp_path_factory.mktemp("loss") / "loss.json"
    # With a history of the temperature, there is more of the loss state to be lost.
    loss.write_text(json.dumps({"adaptive_temperature": True, "label_smoothing": 0.1}))
    flags = {
        "data": text_folder,
        "cache": tmp_path_factory.mktemp("cache"),
        "steps": 6,
        "batch-size": 4,
        "sequence-length": 32,
        "vocab-size": 300,
        "warmup-steps": 2,
        "microbatches": 1,
        "eval-batches": 1,
        "sample-tokens": 0,
        "log-every": 1,
        "dtype": "float32",
        "mesh": "data=1",
        "model.layers": 1,
        "model.width": 32,
        "model.heads": 2,
        "loss-config": loss,
    }
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]

"""Checkpoints by orbax, each whole or absent, each verified before it is used.

`<folder>/step_00000200/` holds `state/` (orbax), `data.json` (the data iterator) and
`sha256.json`: the checksum of every other file, because a flipped bit otherwise loads
without a word. A checkpoint is written under another name and renamed when complete.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TypeVar, cast

import flax.serialization
import jax
import orbax.checkpoint as ocp
from errors import TrainingError
from jax.experimental import multihost_utils

T = TypeVar("T")
PREFIX = "step_"
PARTIAL = "partial_"
MANIFEST = "sha256.json"
DataState = dict[str, object]


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder.resolve()
        self._keep = keep
        self._writer = ocp.StandardCheckpointer()
        self._pending: int | None = None

    def latest(self) -> int | None:
        """Returns the step of the newest whole checkpoint."""
        return max(self._steps(), default=None)

    def save(self, step: int, state: object, data_state: DataState) -> None:
        """Starts to save; the state may be donated as soon as this returns."""
        self.finish()
        if step in self._steps():
            return
        partial = self._path(step, PARTIAL)
        if jax.process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (partial / "data.json").write_text(json.dumps(data_state))
        _wait_for_all("checkpoint folder")
        self._writer.save(partial / "state", flax.serialization.to_state_dict(state))
        self._pending = step

    def finish(self) -> None:
        """Waits for a save under way, seals it, and drops the oldest checkpoints."""
        if self._pending is None:
            return
        self._writer.wait_until_finished()
        step, self._pending = self._pending, None
        if jax.process_index() == 0:
            partial = self._path(step, PARTIAL)
            (partial / MANIFEST).write_text(json.dumps(_checksums(partial), indent=1))
            partial.rename(self._path(step))
            for old in sorted(self._steps())[: -self._keep]:
                shutil.rmtree(self._path(old))
        _wait_for_all("checkpoint sealed")

    def restore(self, step: int, state: T) -> tuple[T, DataState]:
        """Loads a checkpoint into a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          TrainingError: the checkpoint is damaged or of another model.
        """
        path = self._path(step)
        self._verify(step)
        target = flax.serialization.to_state_dict(state)
        try:
            loaded = self._writer.restore(path / "state", target)
        except (ValueError, KeyError, OSError) as error:
            raise TrainingError(f"checkpoint {path} does not load: {error}") from error
        data_state = json.loads((path / "data.json").read_text())
        restored = cast(T, flax.serialization.from_state_dict(state, loaded))
        return restored, data_state

    def _verify(self, step: int) -> None:
        path = self._path(step)
        try:
            expected = json.loads((path / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise self._damaged(step, f"{MANIFEST}: {error}") from error
        found = _checksums(path)
        if expected != found:
            names = sorted(set(expected) | set(found))
            wrong = [name for name in names if expected.get(name) != found.get(name)]
            raise self._damaged(step, ", ".join(wrong))

    def _damaged(self, step: int, what: str) -> TrainingError:
        older = max((s for s in self._steps() if s < step), default=None)
        way_out = (
            f"delete that folder to go on from step {older}"
            if older is not None
            else "there is no older one: start again with a new --out"
        )
        return TrainingError(
            f"checkpoint {self._path(step)} is damaged ({what}); {way_out}"
        )

    def _steps(self) -> list[int]:
        return [
            int(path.name.removeprefix(PREFIX))
            for path in self._folder.glob(f"{PREFIX}*")
            if path.name.removeprefix(PREFIX).isdecimal()
        ]

    def _path(self, step: int, prefix: str = PREFIX) -> Path:
        return self._folder / f"{prefix}{step:08d}"


def _checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the manifest itself, by relative path."""
    sums: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST:
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _wait_for_all(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)

"""Checkpoints by orbax, each whole or absent, each verified before it is used.

`<folder>/step_00000200/` holds `state/` (orbax), `data.json` (the data iterator) and
`sha256.json`: the checksum of every other file, because a flipped bit otherwise loads
without a word. A checkpoint is written under another name and renamed when complete,
and renamed again before it is removed, so that no kill leaves half of one behind.
"""

import errno
import functools
import json
import shutil
import sys
import types
from pathlib import Path
from typing import TypeVar, cast

import absl.logging
import flax.serialization
import jax
import orbax.checkpoint as ocp

from trainer.data.text import DataState
from trainer.errors import TrainingError
from trainer.files import find_damage, make_empty, seal, write_whole, writing
from trainer.run.processes import from_first

T = TypeVar("T")
PREFIX = "step_"
PARTIAL = "partial_"
NONE = -1


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background.

    To save, enter it as a context; reading needs none.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder.resolve()
        self._keep = keep
        _quieten_orbax()
        self._writer = ocp.StandardCheckpointer()
        self._pending: int | None = None

    def __enter__(self) -> "Checkpoints":
        # Not before: who only reads must not touch what a running trainer writes.
        from_first(self._clear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        # After an error the other processes may never come to where this one waits.
        if error is None or jax.process_count() == 1:
            self.finish()

    def steps(self) -> list[int]:
        """Returns the steps of all whole checkpoints, rising."""
        return sorted(
            int(path.name.removeprefix(PREFIX))
            for path in self._folder.glob(f"{PREFIX}*")
            if path.name.removeprefix(PREFIX).isdecimal()
        )

    def latest(self) -> int | None:
        """Returns the step of the newest whole checkpoint."""
        step = from_first(lambda: max(self.steps(), default=NONE))
        return None if step == NONE else step

    def save(self, step: int, state: object, data_state: DataState) -> None:
        """Starts to save; the state may be donated as soon as this returns.

        Raises:
          TrainingError: the disk is full or the folder cannot be written.
        """
        self.finish()
        if from_first(lambda: int(step in self.steps())):
            return
        partial = self._path(step, PARTIAL)
        tree = flax.serialization.to_state_dict(state)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        from_first(lambda: self._begin(step, data_state, size))
        try:
            self._writer.save(partial / "state", tree)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._pending = step

    def finish(self) -> None:
        """Waits for a save under way, seals it, and drops the oldest checkpoints.

        Raises:
          TrainingError: as for `save`.
        """
        if self._pending is None:
            return
        step, self._pending = self._pending, None
        try:
            self._writer.wait_until_finished()
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        from_first(lambda: self._seal(step))

    def restore(self, step: int, state: T) -> tuple[T, DataState]:
        """Loads a checkpoint into a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          TrainingError: the checkpoint is damaged or of another model.
        """
        path = self._path(step)
        from_first(lambda: self._verify(step))
        target = flax.serialization.to_state_dict(state)
        try:
            self._check_shapes(step, target)
            loaded = self._writer.restore(path / "state", target)
            data_state = json.loads((path / "data.json").read_text())
        except (ValueError, KeyError, OSError) as error:
            raise TrainingError(f"checkpoint {path} does not load: {error}") from error
        restored = cast(T, flax.serialization.from_state_dict(state, loaded))
        return restored, data_state

    def _begin(self, step: int, data_state: DataState, size: int) -> int:
        partial = self._path(step, PARTIAL)
        make_empty(partial)
        free = shutil.disk_usage(partial).free
        if free < size:
            short = (
                f"No space left on device: it takes {size:,} bytes, {free:,} are free"
            )
            raise self._failed(step, OSError(errno.ENOSPC, short))
        write_whole(partial / "data.json", json.dumps(data_state))
        return step

    def _seal(self, step: int) -> int:
        partial = self._path(step, PARTIAL)
        with writing(partial):
            seal(partial)
            partial.rename(self._path(step))
            for old in self.steps()[: -self._keep]:
                aside = self._path(old, PARTIAL)
                self._path(old).rename(aside)
                shutil.rmtree(aside)
        return step

    def _clear(self) -> int:
        """Removes what a kill has left behind."""
        leftovers = list(self._folder.glob(f"{PARTIAL}*"))
        for partial in leftovers:
            with writing(partial):
                shutil.rmtree(partial)
        return len(leftovers)

    def _failed(self, step: int, error: Exception) -> TrainingError:
        """The message for a save that failed; its rest is removed to make room."""
        partial = self._path(step, PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        last = max(self.steps(), default=None)
        kept = "there is none yet" if last is None else f"that of step {last} stays"
        return TrainingError(
            f"cannot write the checkpoint of step {step} to {self._folder} "
            f"({_reason(error)}); {kept}: make room or make it writable, and the same "
            "command goes on"
        )

    def _verify(self, step: int) -> int:
        damage = find_damage(self._path(step))
        if not damage:
            return step
        older = [s for s in reversed(self.steps()) if s < step]
        sound = [s for s in older if not find_damage(self._path(s))]
        broken = [s for s in older if s > (sound[0] if sound else NONE)]
        names = " and ".join(str(self._path(s)) for s in [step, *broken])
        way_out = (
            f"delete {names} to go on from step {sound[0]}, which is sound"
            if sound
            else "there is no sound older one: start again with a new --out"
        )
        raise TrainingError(
            f"checkpoint {self._path(step)} is damaged ({', '.join(damage)}); {way_out}"
        )

    def _check_shapes(self, step: int, target: object) -> None:
        """Orbax says little about a shape and nothing about a dtype that differs."""
        path = self._path(step)
        stored = self._writer.metadata(path / "state").item_metadata
        found = _signatures(None if stored is None else stored.tree)
        wanted = _signatures(target)
        for name in sorted(set(found) | set(wanted)):
            if found.get(name) != wanted.get(name):
                raise TrainingError(
                    f"checkpoint {path} is of another model: {name} is "
                    f"{found.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} here; choose another --out"
                )

    def _path(self, step: int, prefix: str = PREFIX) -> Path:
        return self._folder / f"{prefix}{step:08d}"


@functools.cache
def _quieten_orbax() -> None:
    """Leaves the message to us: every failure reaches us as an exception.

    Orbax also logs its traceback; and when a write fails, its other writers outlive the
    loop that they report to, and each says so.
    """
    absl.logging.set_verbosity(absl.logging.FATAL)
    tell = sys.unraisablehook

    def tell_unless_closed(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            tell(unraisable)

    sys.unraisablehook = tell_unless_closed


def _signatures(tree: object) -> dict[str, str]:
    """Dtype and shape of every array, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype}{list(leaf.shape)}"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _reason(error: Exception) -> str:
    """The system's own words, out of a message of many lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0]
    return text.rpartition(": ")[2].partition(" [")[0]

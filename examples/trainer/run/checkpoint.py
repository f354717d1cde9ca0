"""Checkpoints by orbax, each whole or absent, each verified before it is used.

`<folder>/step_00000200/` holds `state/`, `data/` (the data iterator) and `sha256.json`:
the checksums of both, which orbax does not keep, and without which a flipped bit loads
silently. Orbax writes a checkpoint under another name and renames it when it is
complete; an old one is renamed before it is removed. So no kill leaves half of one.
"""

import errno
import functools
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
from trainer.files import find_corrupt, write_manifest, writing
from trainer.run.processes import from_first, is_first

T = TypeVar("T")
NAMES = ocp.path.step.standard_name_format(
    step_prefix="step", step_format_fixed_length=8
)
PARTIAL = "*.orbax-checkpoint-tmp*"
DELETED = "deleted"
# Orbax's notes about a checkpoint, the last of which it writes after the checksums.
NOTES = ("_CHECKPOINT_METADATA", "commit_success.txt")
NONE = -1


class Checkpoints:
    """The checkpoints of one run; they are written in the background.

    To save, enter it as a context; reading needs none, and changes nothing.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        _quieten_orbax()
        self._folder = folder.resolve()
        self._keep = keep
        self._pending = NONE
        self._manager = self._open(read_only=True)

    def _open(self, *, read_only: bool) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self._folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                step_name_format=NAMES,
                preservation_policy=ocp.checkpoint_managers.LatestN(self._keep),
                todelete_subdir=DELETED,
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                read_only=read_only,
                async_options=ocp.AsyncOptions(
                    post_finalization_callback=self._add_checksums
                ),
            ),
        )

    def __enter__(self) -> "Checkpoints":
        # Not before: a reader must not touch what a running trainer writes.
        with writing(self._folder):
            self._manager = self._open(read_only=False)
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
        return sorted(self._manager.all_steps())

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
        tree = flax.serialization.to_state_dict(state)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
        from_first(lambda: self._check_space(step, size))
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(tree), data=ocp.args.JsonSave(data_state)
        )
        try:
            self._manager.save(step, args=items, force=True)
        except (OSError, ValueError) as error:
            raise self._failed(step, error) from error
        self._pending = step

    def finish(self) -> None:
        """Waits for a save under way, and for the oldest checkpoints to be removed.

        Raises:
          TrainingError: as for `save`.
        """
        if self._pending == NONE:
            return
        step, self._pending = self._pending, NONE
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, TrainingError) as error:
            raise self._failed(step, error) from error
        from_first(self._clear)

    def restore(self, step: int, state: T) -> tuple[T, DataState]:
        """Loads a checkpoint into a tree of `jax.ShapeDtypeStruct` with shardings.

        Raises:
          TrainingError: the checkpoint is corrupt or of another model.
        """
        from_first(lambda: self._verify(step))
        target = flax.serialization.to_state_dict(state)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()
        )
        try:
            self._check_shapes(step, target)
            loaded = self._manager.restore(step, args=items)
        except (ValueError, KeyError, OSError) as error:
            raise TrainingError(
                f"checkpoint {self._path(step)} does not load: {error}"
            ) from error
        restored = cast(T, flax.serialization.from_state_dict(state, loaded["state"]))
        return restored, loaded["data"]

    def _check_space(self, step: int, size: int) -> int:
        free = shutil.disk_usage(self._folder).free
        if free < size:
            short = (
                f"No space left on device: it takes {size:,} bytes, {free:,} are free"
            )
            raise self._failed(step, OSError(errno.ENOSPC, short))
        return step

    def _add_checksums(self) -> None:
        """Called by orbax when all is written, before it renames the checkpoint."""
        if is_first():
            for partial in self._folder.glob(PARTIAL):
                write_manifest(partial, NOTES)

    def _clear(self) -> int:
        """Removes the checkpoints that were put aside to be removed."""
        with writing(self._folder):
            if (self._folder / DELETED).exists():
                shutil.rmtree(self._folder / DELETED)
        return 0

    def _failed(self, step: int, error: Exception) -> TrainingError:
        """Returns the message for a save that failed, and removes what it wrote."""
        for partial in self._folder.glob(PARTIAL):
            shutil.rmtree(partial, ignore_errors=True)
        last = max((s for s in self.steps() if s != step), default=None)
        kept = "there is none yet" if last is None else f"that of step {last} stays"
        return TrainingError(
            f"cannot write the checkpoint of step {step} to {self._folder} "
            f"({_reason(error)}); {kept}: free some space or make it writable, and the "
            "same command resumes"
        )

    def _verify(self, step: int) -> int:
        corrupt = find_corrupt(self._path(step), NOTES)
        if not corrupt:
            return step
        older = [s for s in reversed(self.steps()) if s < step]
        valid = [s for s in older if not find_corrupt(self._path(s), NOTES)]
        broken = [s for s in older if s > (valid[0] if valid else NONE)]
        names = " and ".join(str(self._path(s)) for s in [step, *broken])
        way_out = (
            f"delete {names} to resume from step {valid[0]}, which is valid"
            if valid
            else "there is no valid older one: start again with a new --out"
        )
        raise TrainingError(
            f"checkpoint {self._path(step)} is corrupt ({', '.join(corrupt)}); "
            f"{way_out}"
        )

    def _check_shapes(self, step: int, target: object) -> None:
        """Orbax says little about a shape and nothing about a dtype that differs."""
        path = self._path(step)
        stored = self._manager.item_metadata(step)["state"]
        found = _signatures(None if stored is None else stored.tree)
        wanted = _signatures(target)
        for name in sorted(set(found) | set(wanted)):
            if found.get(name) != wanted.get(name):
                raise TrainingError(
                    f"checkpoint {path} is of another model: {name} is "
                    f"{found.get(name, 'absent')} there and "
                    f"{wanted.get(name, 'absent')} here; choose another --out"
                )

    def _path(self, step: int) -> Path:
        return self._folder / NAMES.build_name(step)


@functools.cache
def _quieten_orbax() -> None:
    """Silences orbax's own logs: every failure reaches us as an exception.

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
    """Returns the system's error text from a message of many lines."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).splitlines()[0]
    return text.rpartition(": ")[2].partition(" [")[0]

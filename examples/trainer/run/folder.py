"""The record of a run, `config.json`, and the refusal to resume it as another run."""

import contextlib
import dataclasses
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import ava_jax
from trainer.data.corpus import Corpus
from trainer.errors import TrainingError
from trainer.files import locked, parse_json, read_text, write_whole, writing
from trainer.model.layers import ModelConfig
from trainer.run.processes import check_same, from_first
from trainer.run.settings import Settings

# What a resumed run may change: it alters no number that training computes.
FREE = {
    "cache",
    "checkpoint_every",
    "compile_for",
    "data",
    "deterministic",
    "eval_batches",
    "keep",
    "log_every",
    "loss_config",
    "max_skipped_steps",
    "mesh",
    "out",
    "preset",
    "prompt",
    "sample_tokens",
    "steps",
}


LOCK = "lock"

# What may differ between processes: folders of their own machine.
LOCAL = {"cache", "data", "loss_config"}


@contextlib.contextmanager
def only_trainer(out: Path) -> Iterator[None]:
    """Holds the lock of a run's folder, which the first process takes for all.

    Raises:
      TrainingError: another trainer is at work there, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        from_first(lambda: _lock(stack, out))
        yield


def _remove_empty(out: Path) -> None:
    """Removes a folder of a run that never began, which holds nothing but the lock."""
    with contextlib.suppress(OSError):
        if [path.name for path in out.iterdir()] == [LOCK]:
            (out / LOCK).unlink()
            out.rmdir()


def _lock(stack: contextlib.ExitStack, out: Path) -> int:
    try:
        stack.enter_context(locked(out / LOCK, wait=False))
        stack.callback(_remove_empty, out)
    except BlockingIOError as error:
        raise TrainingError(
            f"another trainer is at work on --out {out}: wait until it has ended, end "
            "it, or choose another --out"
        ) from error
    return 0


def open_run(
    settings: Settings, loss: ava_jax.UnifiedLossConfig, corpus: Corpus
) -> None:
    """Creates the folder and its config.json, or checks that they belong to this run.

    Raises:
      TrainingError: the folder holds a run with other settings, loss or data, or it
        cannot be written, or the processes were started differently.
    """
    config = _record(settings, loss, corpus)
    shared = {k: v for k, v in config["settings"].items() if k not in LOCAL}
    check_same(
        {
            "settings": json.dumps([shared, config["loss"]], sort_keys=True),
            "text in --data": corpus.sha256,
        }
    )
    path = settings.out / "config.json"
    from_first(lambda: _open(path, config))
    if not path.exists():
        raise TrainingError(
            f"{path} was made by the first process and is not here: --out must be a "
            "folder that all processes share"
        )


def _open(path: Path, config: dict[str, dict[str, object]]) -> int:
    if path.exists():
        _refuse_changes(path, config)
    elif (path.parent / "checkpoints").exists():
        raise TrainingError(
            f"{path.parent} has checkpoints but no config.json, so nobody can say "
            "whether they fit: choose another --out"
        )
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(config, indent=2) + "\n")
    return 0


def refuse_other_data(out: Path, corpus: Corpus) -> None:
    """Refuses text that is not the run's, before it is tokenized.

    Raises:
      TrainingError: the text has changed since the run began.
    """
    try:
        before = _stored(out / "config.json")["data"]
        same, size = before["sha256"] == corpus.sha256, int(before["size"])
    except (OSError, ValueError, KeyError, TypeError, TrainingError):
        # There is no run yet, or open_run says what is wrong with it.
        return
    if not same:
        raise TrainingError(
            f"the text of {corpus.name} is not that of the run in {out}: it had "
            f"{size:,} bytes and now has {corpus.size:,}. Bring it back to resume, or "
            "choose another --out; what was saved stays"
        )


def _stored(path: Path) -> dict[str, dict[str, Any]]:
    """Reads a config.json."""
    record = parse_json(read_text(path), path)
    if isinstance(record, dict) and all(
        isinstance(record.get(part), dict) for part in ("settings", "loss", "data")
    ):
        return record
    raise TypeError("settings, loss or data is missing")


def _record(
    settings: Settings, loss: ava_jax.UnifiedLossConfig, corpus: Corpus
) -> dict[str, dict[str, object]]:
    record = {
        "settings": dataclasses.asdict(settings),
        "loss": dataclasses.asdict(loss),
        "data": {"name": corpus.name, "sha256": corpus.sha256, "size": corpus.size},
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "ava_jax": ava_jax.__version__,
        },
    }
    return json.loads(json.dumps(record, default=str))


def _refuse_changes(path: Path, config: dict[str, dict[str, object]]) -> None:
    try:
        before = _stored(path)
        # An older trainer's record lacks the sizes that its model had no choice of.
        model = dataclasses.asdict(ModelConfig()) | before["settings"]["model"]
        before["settings"]["model"] = model
        parts = [(part, before[part], config[part]) for part in ("settings", "loss")]
        old_data = before["data"]["sha256"]
    except (OSError, KeyError, TypeError, TrainingError) as error:
        raise TrainingError(f"{path} is corrupt: {error!r}") from error
    changes = [
        f"{part}.{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for part, old, new in parts
        for name in sorted(set(old) | set(new))
        if name not in FREE and old.get(name) != new.get(name)
    ]
    if old_data != config["data"]["sha256"]:
        changes.append("the text in --data")
    if changes:
        raise TrainingError(
            f"{path.parent} holds a run with other settings, which cannot be resumed "
            "with these: choose another --out, or go back. Changed:\n  "
            + "\n  ".join(changes)
        )

"""The record of a run, `config.json`, and the refusal to go on as another run."""

import dataclasses
import json
import platform
from pathlib import Path

import jax
from corpus import Corpus
from errors import TrainingError
from settings import Settings

import ava_jax

# What a resumed run may change: it alters no number that training computes.
FREE = {
    "cache",
    "checkpoint_every",
    "data",
    "eval_batches",
    "keep",
    "log_every",
    "loss_config",
    "mesh",
    "out",
    "preset",
    "prompt",
    "sample_tokens",
    "steps",
}


def open_run(
    settings: Settings, loss: ava_jax.UnifiedLossConfig, corpus: Corpus
) -> None:
    """Makes the folder and its config.json, or checks that they are of this run.

    Raises:
      TrainingError: the folder holds a run with other settings, loss or data.
    """
    path = settings.out / "config.json"
    config = _record(settings, loss, corpus)
    if path.exists():
        _refuse_changes(path, config)
    elif (settings.out / "checkpoints").exists():
        raise TrainingError(
            f"{settings.out} has checkpoints but no config.json, so nobody can say "
            "whether they fit: choose another --out"
        )
    if jax.process_index() == 0:
        settings.out.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(config, indent=2) + "\n")
        part.replace(path)


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
        before = json.loads(path.read_text())
        parts = [(part, before[part], config[part]) for part in ("settings", "loss")]
        old_data = before["data"]["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{path} is damaged: {error!r}") from error
    changes = [
        f"{part}.{name} was {old.get(name)!r} and is now {new.get(name)!r}"
        for part, old, new in parts
        for name in sorted(set(old) | set(new))
        if name not in FREE and old.get(name) != new.get(name)
    ]
    if old_data != config["data"]["sha256"]:
        changes.append(
            f"the data had sha256 {old_data} and now have {config['data']['sha256']}"
        )
    if changes:
        raise TrainingError(
            f"{path.parent} holds a run with other settings, which cannot be resumed "
            "with these: choose another --out, or go back. Changed:\n  "
            + "\n  ".join(changes)
        )

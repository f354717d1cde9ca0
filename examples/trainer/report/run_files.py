"""Reads back the files of a run."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

import ava_jax
from trainer.errors import TrainingError
from trainer.files import parse_json, read_text
from trainer.report.metrics import Record, read_records
from trainer.report.samples import Sample, read_samples
from trainer.run.settings import DERIVED, Settings

Config = Mapping[str, Mapping[str, object]]

# Where a run is, not what it is.
LOCATIONS = ("settings.cache", "settings.out", "settings.preset")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One setting of a run; `default` is None where there is none."""

    name: str
    value: object
    default: object

    @property
    def is_chosen(self) -> bool:
        """Whether the user or the preset changed it."""
        return self.value != self.default


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run, finished or not.

    Attributes:
      name: of the folder.
      config: `config.json`: settings, loss, data, versions.
      planned: steps that the run is to have.
      experts: per layer (E); 0 for a dense model.
      records: `metrics.jsonl`; empty before the first step.
      heldout: `heldout.jsonl`; empty before the first evaluation.
      samples: `samples.jsonl`; empty before the end.
    """

    name: str
    config: Config
    planned: int
    experts: int
    records: list[Record]
    heldout: list[Record]
    samples: list[Sample]

    @property
    def steps(self) -> np.ndarray:
        """The step of every record."""
        return self.column("step")

    def column(self, name: str) -> np.ndarray:
        """One metric of every record; NaN where it is missing."""
        return np.array([record.get(name, np.nan) for record in self.records], float)

    @property
    def names(self) -> list[str]:
        """All metrics, those of the last record first."""
        return list(dict.fromkeys([*self.records[-1], *self.records[0]]))

    @property
    def has_further_heads(self) -> bool:
        """Whether the model predicts more than the next token."""
        loss = self.config["loss"]
        is_adaptive = loss.get("primary_loss_type") == "adaptive_mtp"
        return is_adaptive or bool(loss.get("use_mtp"))

    def parameters(self) -> list[Parameter]:
        """Settings and fields of the loss, by their dotted names."""
        flat = _flatten({k: self.config[k] for k in ("settings", "loss")})
        defaults = _defaults()
        return [Parameter(k, v, defaults.get(k)) for k, v in flat.items()]


def is_telling(parameter: Parameter) -> bool:
    """Whether a parameter distinguishes the run from others."""
    derived = {f"loss.{name}" for name in DERIVED}
    return parameter.is_chosen and parameter.name not in derived | set(LOCATIONS)


def read_run(folder: Path) -> RunFiles:
    """Reads a run's folder; files that do not exist yet are empty.

    Raises:
      TrainingError: the folder is not a run, or one of its files is malformed.
    """
    path = folder / "config.json"
    config = _read_config(path)
    match config["settings"]:
        case {"steps": int(planned), "model": {"experts": int(experts)}}:
            return RunFiles(
                name=folder.resolve().name,
                config=config,
                planned=planned,
                experts=experts,
                records=read_records(folder / "metrics.jsonl"),
                heldout=read_records(folder / "heldout.jsonl"),
                samples=read_samples(folder / "samples.jsonl"),
            )
    raise TrainingError(f"{path} does not say how many steps and experts the run has")


def _read_config(path: Path) -> Config:
    try:
        config = parse_json(read_text(path), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise TrainingError(
            f"{path.parent} is no run of the trainer: it has no config.json. Pass the "
            "folder that --out named"
        ) from error
    except (OSError, TrainingError) as error:
        raise TrainingError(f"cannot read {path}: {error}") from error
    match config:
        case {"settings": dict(), "loss": dict(), "data": dict(), "versions": dict()}:
            return cast(Config, config)
    raise TrainingError(
        f"{path} was not written by the trainer: settings, loss, data "
        "or versions is missing"
    )


def _defaults() -> dict[str, object]:
    fields = {
        field.name: field.default
        for field in dataclasses.fields(ava_jax.UnifiedLossConfig)
        if field.default is not dataclasses.MISSING
    }
    plain = {"settings": dataclasses.asdict(Settings()), "loss": fields}
    return _flatten(json.loads(json.dumps(plain, default=str)))


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat

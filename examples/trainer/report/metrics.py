"""Metrics: fetched from the device in one transfer, one step late, and logged."""

import contextlib
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from trainer.errors import TrainingError
from trainer.files import parse_json, read_text, write_whole, writing

Record = dict[str, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """All scalars of a step in one vector, which shares no memory with the state."""

    values: Float[Array, "M"]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(cls, scalars: dict[str, Array]) -> "Metrics":
        """Packs scalars, vectors and arrays of layers × experts.

        Entry i of a vector `x` is called `x_i`, layer l and expert e of an array `x`
        `x_Ll_Ee`, all from 1.
        """
        names = [_entry_names(name, value.shape) for name, value in scalars.items()]
        values = [value.astype(jnp.float32).reshape(-1) for value in scalars.values()]
        return cls(jnp.concatenate(values), tuple(itertools.chain(*names)))

    def fetch(self) -> Record:
        """Returns Python floats; waits for the device if it must."""
        values = np.asarray(self.values).tolist()
        return dict(zip(self.names, values, strict=True))


def _entry_names(name: str, shape: tuple[int, ...]) -> list[str]:
    letters = {0: (), 1: ("",), 2: ("L", "E")}[len(shape)]
    indices = itertools.product(*(range(1, size + 1) for size in shape))
    return [
        "_".join([name, *(f"{x}{i}" for x, i in zip(letters, index, strict=True))])
        for index in indices
    ]


class MetricsLog:
    """`metrics.jsonl` of one run, a line at a time.

    Args:
      path: of the file.
      start: the step that the run resumes from; later lines, which a killed run may
        have left, are dropped.
      is_writer: False on all processes but the first.
    """

    def __init__(self, path: Path, start: int, is_writer: bool) -> None:
        self._path = path
        self._file = None
        records = read_records(path, "step", "seconds")
        kept = [record for record in records if record["step"] <= start]
        self._base = kept[-1]["seconds"] if kept else 0.0
        self._begun = time.perf_counter()
        if is_writer:
            _write_records(path, kept)
            with writing(path):
                self._file = path.open("a")

    def seconds(self) -> float:
        """Seconds of training, over all the sessions of the run."""
        return self._base + time.perf_counter() - self._begun

    def write(self, step: int, tokens: int, record: Record) -> None:
        """Appends one step and flushes it."""
        if self._file is None:
            return
        line = {"step": step, "tokens": tokens, "seconds": self.seconds()} | record
        with writing(self._path):
            self._file.write(_to_line(line))
            self._file.flush()

    def close(self) -> None:
        """Closes the file; errors in writing have been reported before."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()


def read_records(path: Path, *needed: str) -> list[Record]:
    """Reads a .jsonl of numbers; a last line cut short by a kill is left out.

    JSON knows no NaN and no infinity: both are written as null and read as NaN.

    Raises:
      TrainingError: something is no number, or a line lacks one that is `needed`, by
        default its step.
    """
    records = [
        {name: _number(path, name, value) for name, value in line.items()}
        for line in read_lines(path)
    ]
    for number, record in enumerate(records, start=1):
        for name in needed or ("step",):
            if not math.isfinite(record.get(name, math.nan)):
                raise TrainingError(
                    f"{path}, line {number} has no {name}: mend the line or remove it"
                )
    return records


def _number(path: Path, name: str, value: object) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        raise TrainingError(f"{path}: {name} must be a number, got {value!r}")
    return value


def read_lines(path: Path) -> list[dict[str, object]]:
    """Reads a .jsonl of objects; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = read_text(path).rstrip("\n").split("\n")
    objects: list[dict[str, object]] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        try:
            match parse_json(line, where):
                case dict(found):
                    objects.append(found)
                case _:
                    raise TrainingError(f"{where}: needs an object")
        except TrainingError:
            if number < len(lines):
                raise
    return objects


def steps_of(path: Path) -> set[float]:
    """Returns the steps that a .jsonl has records of."""
    return {record["step"] for record in read_records(path)}


def append_record(path: Path, record: Record) -> None:
    """Adds one record to a short .jsonl."""
    _write_records(path, [*read_records(path), record])


def _write_records(path: Path, records: list[Record]) -> None:
    write_whole(path, "".join(map(_to_line, records)))


def _to_line(record: Record) -> str:
    finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"

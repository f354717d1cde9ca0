"""Metrics: off the device in one transfer, one step late, and into files."""

import dataclasses
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from errors import TrainingError
from jaxtyping import Array, Float
from tensorboardX import SummaryWriter

Record = dict[str, float]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Metrics:
    """All scalars of a step in one vector, which shares no memory with the state."""

    values: Float[Array, "M"]
    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def pack(cls, scalars: dict[str, Array]) -> "Metrics":
        """Packs scalars and arrays; entry i of an array `x` is called `x_i`, from 1."""
        flat: dict[str, Array] = {}
        for name, value in scalars.items():
            if value.ndim == 0:
                flat[name] = value
                continue
            for index, entry in enumerate(value.reshape(-1), start=1):
                flat[f"{name}_{index}"] = entry
        values = [value.astype(jnp.float32) for value in flat.values()]
        return cls(jnp.stack(values), tuple(flat))

    def fetch(self) -> Record:
        """Returns numbers of the host; waits for the device if it must."""
        values = np.asarray(self.values).tolist()
        return dict(zip(self.names, values, strict=True))


def check(step: int, record: Record) -> None:
    """Refuses a step whose numbers say that going on makes no sense.

    Raises:
      TrainingError: a target outside the vocabulary, or a loss that is not finite.
    """
    if record["num_invalid_targets"] > 0:
        raise TrainingError(
            f"step {step}: {record['num_invalid_targets']:.0f} targets lie outside the "
            "vocabulary: the tokens and the tokenizer do not belong together (empty "
            "the --cache folder)"
        )
    for name in ("total_loss", "grad_norm"):
        if not math.isfinite(record[name]):
            raise TrainingError(
                f"step {step}: {name} is {record[name]}; nothing was saved after the "
                "last good checkpoint: lower --learning-rate and begin with a new --out"
            )


class MetricsLog:
    """`metrics.jsonl` and TensorBoard events of one run.

    Args:
      out: folder of the run.
      start: the step that the run goes on from; later lines, which a run that was
        killed may have left, are dropped.
      is_writer: False on all hosts but the first.
    """

    def __init__(self, out: Path, start: int, is_writer: bool) -> None:
        self._path = out / "metrics.jsonl"
        self._file = None
        self._board = None
        kept = [
            record for record in read_records(self._path) if record["step"] <= start
        ]
        self._base = kept[-1]["seconds"] if kept else 0.0
        self._begun = time.perf_counter()
        if is_writer:
            _write_records(self._path, kept)
            self._file = self._path.open("a")
            self._board = SummaryWriter(
                str(out / "tensorboard"), purge_step=start + 1 if start else None
            )

    def seconds(self) -> float:
        """Seconds of training, over all the sessions of the run."""
        return self._base + time.perf_counter() - self._begun

    def write(self, step: int, tokens: int, record: Record) -> None:
        """Appends one step."""
        if self._file is None or self._board is None:
            return
        line = {"step": step, "tokens": tokens, "seconds": self.seconds()} | record
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still buffered."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_records(path: Path) -> list[Record]:
    """Reads a .jsonl of numbers; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines()
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise TrainingError(f"{path}, line {number}: {error}") from error
    return records


def append_record(path: Path, record: Record) -> None:
    """Appends one line to a .jsonl."""
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def _write_records(path: Path, records: list[Record]) -> None:
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(record) + "\n" for record in records))
    part.replace(path)

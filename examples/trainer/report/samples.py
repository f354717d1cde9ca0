"""`samples.jsonl`: continuations of the prompt, with their steps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from trainer.errors import TrainingError
from trainer.files import write_whole
from trainer.report.metrics import read_lines


class Sample(NamedTuple):
    """A text of the model; it begins with the prompt."""

    step: int
    prompt: str
    text: str


def keep_sample(path: Path, sample: Sample) -> None:
    """Adds a sample to the file, unless it is there already."""
    samples = read_samples(path)
    if sample not in samples:
        lines = [json.dumps(kept._asdict()) + "\n" for kept in [*samples, sample]]
        write_whole(path, "".join(lines))


def read_samples(path: Path) -> list[Sample]:
    """Reads all samples of a run; there are none before the file exists.

    Raises:
      TrainingError: a line that is no sample.
    """
    return [_sample(path, line) for line in read_lines(path)]


def _sample(path: Path, line: Mapping[str, object]) -> Sample:
    match line:
        case {"step": int(step), "prompt": str(prompt), "text": str(text)}:
            return Sample(step, prompt, text)
    raise TrainingError(
        f"{path}: a sample must have a step, a prompt and a text, got {line}"
    )

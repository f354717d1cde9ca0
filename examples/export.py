"""Exports a trained model, to be decoded and evaluated at temperature 1.

    python examples/export.py runs/demo exported

The folder holds `params`, an orbax checkpoint of the parameters and of the bias of the
routers; `model.json`, their sizes and what was done to them; and `tokenizer.json`. The
temperature that the model was trained at is folded into `lm_head`, and into the
soft-cap if there is one: nobody has to know it who reads them. Exit code 1: an error,
explained on stderr.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import orbax.checkpoint as ocp

from trainer.errors import TrainingError
from trainer.files import write_whole, writing
from trainer.run.trained import Trained, load


def description(trained: Trained) -> dict[str, object]:
    """Returns what the exported arrays are, as JSON holds it."""
    model = trained.model
    return {
        "step": trained.step,
        "temperature_folded_in": trained.temperature,
        "vocab_size": model.loss.vocab_size,
        "logit_soft_cap": model.loss.logit_soft_cap,
        "sequence_length": trained.length,
        "model": dataclasses.asdict(model.config),
    }


def export(trained: Trained, folder: Path) -> None:
    """Writes the model to a new folder.

    Raises:
      TrainingError: the folder is there, or cannot be written.
    """
    if folder.exists():
        raise TrainingError(f"{folder} is there already: name another folder")
    with writing(folder):
        folder.mkdir(parents=True)
    arrays: dict[str, object] = {"params": trained.params}
    if trained.bias is not None:
        arrays["routing_bias"] = trained.bias
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / "params").resolve(), arrays)
    write_whole(folder / "tokenizer.json", trained.tokenizer.to_str(pretty=True))
    # Last: a folder that has it is complete.
    text = json.dumps(description(trained), indent=2)
    write_whole(folder / "model.json", f"{text}\n")


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="export.py", description="Export a trained model.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("folder", type=Path, help="new folder to write to")
    parser.add_argument("--step", type=int, help="of the checkpoint; default the last")
    options = parser.parse_args(arguments)
    try:
        trained = load(options.run, options.step)
        export(trained, options.folder)
    except (TrainingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{options.folder}: step {trained.step}, temperature "
        f"{trained.temperature:.4g} folded into lm_head"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

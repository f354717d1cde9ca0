"""What recipes on a trained model share: their command line, their files."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from trainer.errors import TrainingError
from trainer.files import write_whole, writing
from trainer.report.metrics import Record
from trainer.run.settings import Settings
from trainer.run.trained import Trained, load


def run_recipe(
    recipe: Callable[[Trained, argparse.Namespace], object],
    arguments: Sequence[str],
    *,
    name: str,
    doc: str | None,
    steps: int,
    reads_text: bool = False,
) -> int:
    """Runs a recipe on the checkpoint that its command line names.

    Args:
      recipe: is called with the model and the options `out`, `steps` and `seed`.
      arguments: the command line.
      name: of the recipe and of its folder.
      doc: its docstring.
      steps: how many steps it takes by default.
      reads_text: whether it has the options `data` and `cache`, too.

    Returns:
      The exit code: 1 after an error, which is explained on stderr.
    """
    parser = argparse.ArgumentParser(
        prog=f"{name}.py", description=(doc or "").partition("\n")[0]
    )
    demo, out = Path("runs/demo"), Path("runs", name)
    parser.add_argument("--checkpoint", type=Path, default=demo, help="folder of a run")
    parser.add_argument("--out", type=Path, default=out, help="folder for the results")
    parser.add_argument("--steps", type=int, default=steps, help="how many to take")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    if reads_text:
        kept = Settings().cache
        parser.add_argument(
            "--data", type=Path, help="the run's text, if it had --data"
        )
        parser.add_argument(
            "--cache", type=Path, default=kept, help="folder for tokens"
        )
    options = parser.parse_args(arguments)
    try:
        if options.steps < 1:
            raise TrainingError(f"--steps must be at least 1, got {options.steps}")
        trained = load_trained(options.checkpoint)
        with writing(options.out):
            options.out.mkdir(parents=True, exist_ok=True)
        recipe(trained, options)
    except (TrainingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def load_trained(folder: Path) -> Trained:
    """Loads the newest checkpoint of a run.

    Raises:
      TrainingError: there is none, or it is corrupt.
    """
    if not (folder / "config.json").exists():
        raise TrainingError(
            f"--checkpoint {folder} holds no run: `make demo` trains one, in runs/demo"
        )
    return load(folder)


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes a .jsonl with one record a line."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))


def plot_curves(
    path: Path, records: Sequence[Record], panels: Mapping[str, Sequence[str]]
) -> None:
    """Draws panels side by side, each with the metrics that stand by its title."""
    steps = [record["step"] for record in records]
    with mpl.rc_context({"font.size": 9}), writing(path):
        size = (4 * max(len(panels), 1.4), 3.4)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, names) in zip(axes, panels.items(), strict=True):
            for name in names:
                values = [record[name] for record in records]
                axis.plot(steps, values, label=name.replace("_", " "))
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            if len(names) > 1:
                axis.legend()
        figure.savefig(path, dpi=110)

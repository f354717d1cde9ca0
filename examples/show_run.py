"""Turns a run's folder into one page that a browser opens without a network.

    python examples/show_run.py runs/demo
    python examples/show_run.py runs/demo --out report.html

It works at any time, also while the run continues. Exit code 1: the folder is no run,
or the page cannot be written; stderr says why.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import TrainingError
from trainer.report.page.render import make_page
from trainer.report.run_files import read_run


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="show_run.py", description="Turn a run's folder into one HTML page."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the page; default RUN/report.html")
    given = parser.parse_args(arguments)
    out = given.out or given.run / "report.html"
    try:
        page = make_page(read_run(given.run))
        _write(out, page)
    except (TrainingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {out}")
    return 0


def _write(path: Path, page: str) -> None:
    try:
        # Text of a run may hold half a character, which UTF-8 cannot write.
        path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

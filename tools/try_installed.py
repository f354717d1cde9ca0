"""Runs README's snippet and all doctests on the ava_jax that is installed.

Needs nothing but the package and its core dependencies: run it by `python -I`, which
leaves the checkout out of the path.
"""

import doctest
import importlib
import importlib.metadata
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import ava_jax


def check_origin() -> None:
    """Exits unless ava_jax comes from this environment, in the version it says."""
    origin = Path(ava_jax.__file__)
    if not origin.is_relative_to(sys.prefix):
        raise SystemExit(f"error: ava_jax comes from {origin}, not from {sys.prefix}")
    installed = importlib.metadata.version("ava-jax")
    if installed != ava_jax.__version__:
        raise SystemExit(
            f"error: ava-jax {installed} is installed, and ava_jax.__version__ is "
            f"{ava_jax.__version__}"
        )


def modules() -> list[ModuleType]:
    """Imports every module of the package."""
    found = pkgutil.walk_packages(ava_jax.__path__, "ava_jax.")
    return [ava_jax, *(importlib.import_module(each.name) for each in found)]


def run_snippet(readme: Path) -> None:
    """Runs the first Python block under "## Use"."""
    section = readme.read_text().split("\n## Use\n", 1)[1].split("\n## ", 1)[0]
    snippet = re.search(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    if snippet is None:
        raise SystemExit(f'error: {readme} has no Python block under "## Use"')
    exec(compile(snippet[1], str(readme), "exec"), {"__name__": "__main__"})


def main(readme: Path) -> None:
    """Runs all of it, and exits with an error if a doctest fails or none is found."""
    check_origin()
    run_snippet(readme)
    results = [doctest.testmod(module) for module in modules()]
    failed = sum(result.failed for result in results)
    attempted = sum(result.attempted for result in results)
    print(f"{readme.name}'s snippet ran; {attempted} examples, {failed} failed")
    if failed or not attempted:
        raise SystemExit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

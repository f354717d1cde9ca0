"""Prints the core dependencies at their lower bounds, as constraints for pip."""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
BOUND = re.compile(r"(?P<name>[\w-]+)>=(?P<version>[\d.]+)(?P<marker>;.*)?")


def lower_bounds(requirements: list[str]) -> list[str]:
    """Returns each requirement pinned to its lower bound, with its marker.

    Raises:
      ValueError: a requirement has another form than `name>=version; marker`.
    """
    pins = []
    for requirement in requirements:
        match = BOUND.fullmatch(requirement)
        if match is None:
            raise ValueError(
                f"{PROJECT.name} requires {requirement!r}, which has no single lower "
                "bound: write name>=version"
            )
        pins.append(f"{match['name']}=={match['version']}{match['marker'] or ''}")
    return pins


def core_dependencies() -> list[str]:
    """Returns the core dependencies as `pyproject.toml` has them."""
    return tomllib.loads(PROJECT.read_text())["project"]["dependencies"]


if __name__ == "__main__":
    print("\n".join(lower_bounds(core_dependencies())))

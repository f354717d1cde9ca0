"""Checks that a tag, the version, the change log and the citation agree.

python tools/check_release.py v1.2.3
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TAG = re.compile(r"v(\d+\.\d+\.\d+)")


def version_of(pattern: str, path: Path) -> str:
    """Returns what the pattern's group matches first in a file."""
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    if match is None:
        raise SystemExit(f"error: {path.name} names no version: it has no {pattern}")
    return match[1]


def versions(root: Path) -> dict[str, str]:
    """Returns the version that each file names, by its path."""
    patterns = {
        "ava_jax/__init__.py": r'^__version__ = "(.*)"$',
        "CHANGELOG.md": r"^## \[(\d.*?)\]",
        "CITATION.cff": r"^version: \"?([^\"\s]*)",
    }
    return {
        name: version_of(pattern, root / name)
        for name, pattern in patterns.items()
        if name != "CITATION.cff" or (root / name).exists()
    }


def check(tag: str, root: Path = ROOT) -> None:
    """Exits with an error unless all of them name the tag's version."""
    match = TAG.fullmatch(tag)
    if match is None:
        raise SystemExit(f"error: the tag is {tag!r}, and has to be like v1.2.3")
    others = {name: v for name, v in versions(root).items() if v != match[1]}
    if others:
        raise SystemExit(f"error: the tag is {tag}, but the version is {others}")
    print(f"{tag} is the version of {', '.join(versions(root))}")


if __name__ == "__main__":
    check(sys.argv[1] if len(sys.argv) > 1 else "")

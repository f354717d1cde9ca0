"""Reading text: files, folders, .jsonl, .gz, or the standard library's own source."""

import dataclasses
import gzip
import hashlib
import os
import platform
import random
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import TrainingError
from trainer.files import parse_json, read_raw, whole_characters

SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "site-packages",
    "test",
    "tests",
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Documents with their name and checksum."""

    name: str
    documents: tuple[str, ...]
    sha256: str
    size: int
    skipped: int = 0

    def describe(self) -> str:
        """Returns one line for people."""
        skipped = f", {self.skipped} not UTF-8 left out" if self.skipped else ""
        return (
            f"{self.name}: {len(self.documents):,} documents, {self.size:,} bytes, "
            f"sha256 {self.sha256}{skipped}"
        )


def load_corpus(path: Path | None) -> Corpus:
    """Reads the documents of a file or folder; of the standard library for None.

    Documents come in an order that depends on their contents alone, shuffled with a
    fixed seed, so that the held-out end resembles the training text.

    Raises:
      TrainingError: nothing there, not text, or a line of .jsonl without `text`.
    """
    if path is None:
        name = f"standard library of Python {platform.python_version()}"
        files = _standard_library()
    else:
        name, files = str(path), _files_of(path)
    documents: list[str] = []
    skipped = 0
    for file in files:
        try:
            documents.extend(text for text in _read(file) if text)
        except UnicodeDecodeError as error:
            if file == path:
                raise TrainingError(f"{file} is not UTF-8 text: {error}") from error
            skipped += 1
    if not documents:
        raise TrainingError(f"no text in {name}: it needs at least one document")
    return _identified(name, documents, skipped)


def _identified(name: str, documents: list[str], skipped: int) -> Corpus:
    digest = hashlib.sha256()
    size = 0
    for document in documents:
        raw = document.encode()
        digest.update(len(raw).to_bytes(8, "little") + raw)
        size += len(raw)
    random.Random(0).shuffle(documents)
    return Corpus(name, tuple(documents), digest.hexdigest(), size, skipped)


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file for file in _list_files(root, SKIPPED_FOLDERS) if file.suffix == ".py"
    ]
    if not files:
        raise TrainingError(
            f"this Python has no source files in {root}: pass --data FILE_OR_FOLDER"
        )
    return files


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise TrainingError(f"no such file or folder: {path} (from --data)")
    if not path.is_dir():
        raise TrainingError(
            f"--data {path} is neither a file nor a folder: write its text to a file"
        )
    return _list_files(path, set())


def _list_files(root: Path, skipped: set[str]) -> list[Path]:
    """Lists all files that are not hidden, in the same order on every machine."""
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in skipped and f[0] != "."]
        files += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(files, key=lambda file: file.relative_to(root).as_posix())


def _read(file: Path) -> Iterator[str]:
    """Yields the documents of one file; .jsonl has one a line."""
    raw, name = read_raw(file), file.name
    if name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise TrainingError(f"{file} is not a whole gzip file: {error}") from error
        name = name.removesuffix(".gz")
    if not name.endswith(".jsonl"):
        yield raw.decode()
        return
    # Not splitlines(): it also splits at characters that a string may hold.
    for number, line in enumerate(raw.decode("utf-8-sig").split("\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{file}, line {number}")


def _text_of(line: str, where: str) -> str:
    match parse_json(line, where):
        case {"text": str(text)}:
            return whole_characters(text, where)
    raise TrainingError(f'{where}: needs an object with a "text" string')

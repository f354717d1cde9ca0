"""Files that are whole or absent, manifests of checksums, errors that name the file."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from trainer.errors import TrainingError

MANIFEST = "sha256.json"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a message that names the file."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"cannot write {path}: {error.strerror or error}; once that is put right, "
            "the same command resumes from the last checkpoint"
        ) from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically."""
    part = path.with_name(f"{path.name}.part")
    raw = content.encode() if isinstance(content, str) else content
    with writing(path):
        try:
            part.write_bytes(raw)
            part.replace(path)
        except OSError:
            part.unlink(missing_ok=True)
            raise


def make_empty(folder: Path) -> None:
    """Creates a folder, or empties it."""
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)


def read_raw(path: Path) -> bytes:
    """Reads a file.

    Raises:
      OSError: it cannot be read, or is a FIFO, a socket or a device, which could keep
        the reader waiting for ever.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        kind = "it is a FIFO, a socket or a device: put a regular file there"
        raise OSError(errno.EINVAL, kind, str(path))
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Reads a file of UTF-8, with a byte order mark or without.

    Raises:
      OSError: as `read_raw` does.
      TrainingError: it is not UTF-8.
    """
    try:
        return read_raw(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text: {error}") from error


def parse_json(text: str, where: object) -> object:
    """Parses JSON.

    Raises:
      TrainingError: it is none, or nested too deeply, and where.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TrainingError(f"{where}: not JSON ({error})") from error


def whole_characters(text: str, where: object) -> str:
    """Returns the text.

    Raises:
      TrainingError: it holds half a character (a lone surrogate), and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise TrainingError(
            f"{where}: {half} is half a character (a lone surrogate): write both "
            "halves, or leave it out"
        ) from error
    return text


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds a file lock; it is released when the process dies.

    Raises:
      BlockingIOError: another process holds it, and `wait` is False.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def write_manifest(folder: Path, ignored: Collection[str] = ()) -> None:
    """Writes the checksums of all files of a folder, but for `ignored`, beside them."""
    sums = _checksums(folder, ignored)
    write_whole(folder / MANIFEST, json.dumps(sums, indent=1))


def find_corrupt(folder: Path, ignored: Collection[str] = ()) -> list[str]:
    """Returns the names of the files that do not match the folder's manifest."""
    try:
        manifest = folder / MANIFEST
        match parse_json(read_text(manifest), manifest):
            case dict(expected):
                found = _checksums(folder, ignored)
            case _:
                return [f"{MANIFEST}: not an object"]
    except (OSError, TrainingError) as error:
        return [f"{MANIFEST}: {error}"]
    names = sorted(set(expected) | set(found))
    return [name for name in names if expected.get(name) != found.get(name)]


def _checksums(folder: Path, ignored: Collection[str]) -> dict[str, str]:
    """SHA-256 of every file but the manifest itself, by relative path."""
    sums: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in (MANIFEST, *ignored):
            with path.open("rb") as file:
                sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums

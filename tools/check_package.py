"""Builds sdist and wheel, checks their contents, and tries both where installed.

Each is installed into a fresh environment without extras, where README's snippet and
the doctests run (`try_installed.py`).
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    """Runs a command, and exits if it fails."""
    print("+", *command, flush=True)
    status = subprocess.run(command, cwd=cwd, check=False).returncode
    if status:
        raise SystemExit(status)


def build() -> tuple[Path, Path]:
    """Builds both, the wheel out of the sdist, and has twine look at them."""
    for old in DIST.glob("*"):
        old.unlink()
    python = (sys.executable, "-W", "error", "-m")
    run(*python, "build", "--outdir", DIST)
    (sdist,), (wheel,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    run(*python, "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def files_of(archive: Path) -> set[str]:
    """Returns the files of an sdist, without its top folder, or of a wheel."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return set(wheel.namelist())
    with tarfile.open(archive) as sdist:
        names = [member.name for member in sdist.getmembers() if not member.isdir()]
    return {name.split("/", 1)[1] for name in names}


def tracked_files() -> set[str]:
    """Returns the files of the commit and of what is about to be committed."""
    listed = subprocess.run(
        ("git", "ls-files", "-z"), cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}


def check_files(archive: Path, wanted: Iterable[str]) -> None:
    """Exits unless the archive has these files and its metadata, and no others."""
    metadata = (".dist-info/METADATA", ".dist-info/RECORD", ".dist-info/WHEEL")
    endings = (*metadata, ".dist-info/licenses/LICENSE", "PKG-INFO")
    files = files_of(archive)
    own = {name for name in files if not name.endswith(endings)}
    missing, surplus = sorted(set(wanted) - own), sorted(own - set(wanted))
    if missing or surplus:
        raise SystemExit(
            f"error: {archive.name} lacks {missing} and has {surplus}, which git does "
            "not track there"
        )
    print(f"{archive.name}: {len(files)} files, {archive.stat().st_size:,} bytes")


def try_installed(archive: Path) -> None:
    """Installs it into a fresh environment, and runs snippet and doctests there."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "venv", "env", cwd=Path(folder))
        python = Path(folder, "env", "bin", "python")
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        run(*pip, "install", "-q", archive, cwd=Path(folder))
        run(*pip, "check", cwd=Path(folder))
        script = ROOT / "tools" / "try_installed.py"
        readme = ROOT / "README.md"
        run(python, "-I", "-W", "error", script, readme, cwd=Path(folder))


def main() -> None:
    """Does all of it; files are compared only in a checkout."""
    os.environ.pop("PYTHONPATH", None)
    sdist, wheel = build()
    if (ROOT / ".git").exists():
        files = tracked_files()
        check_files(sdist, files)
        check_files(wheel, {name for name in files if name.startswith("ava_jax/")})
    with ThreadPoolExecutor() as pool:
        list(pool.map(try_installed, (wheel, sdist)))


if __name__ == "__main__":
    main()

"""The package: one version, the dependencies it imports, and the tools of a release."""

import ast
import io
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import ava_jax
from tools import check_package, check_release, lower_bounds, try_installed

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MODULES = sorted((ROOT / "ava_jax").rglob("*.py"))


def test_the_version_has_one_place() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", ava_jax.__version__)
    assert "version" not in PROJECT
    assert PROJECT["dynamic"] == ["version"]
    path = ROOT / PYPROJECT["tool"]["hatch"]["version"]["path"]
    assert path.samefile(ava_jax.__file__)
    assert check_release.versions(ROOT)["ava_jax/__init__.py"] == ava_jax.__version__


# Dependencies ----------------------------------------------------------------------


def imported_by(path: Path) -> set[str]:
    """Returns the top-level packages that a module imports anywhere."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {each.name.partition(".")[0] for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    return names


def names_of(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=;\[ ]", each)[0] for each in requirements}


def test_the_package_imports_its_core_dependencies_and_nothing_else() -> None:
    imported = set().union(*map(imported_by, MODULES))
    others = imported - set(sys.stdlib_module_names) - {"ava_jax"}
    assert others == names_of(PROJECT["dependencies"])


def test_the_package_does_not_import_kernels_that_are_not_used() -> None:
    program = (
        "import sys, flax.linen, flax.nnx, optax; before = set(sys.modules); "
        "import ava_jax; print(*sorted(set(sys.modules) - before))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "ava_jax.kernel.xla_product" in run.stdout.split()
    assert "pallas" not in run.stdout
    assert "mosaic" not in run.stdout


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    pins = lower_bounds.lower_bounds(lower_bounds.core_dependencies())
    assert names_of(pins) == names_of(PROJECT["dependencies"])
    assert [pin.replace("==", ">=", 1) for pin in pins] == PROJECT["dependencies"]


@pytest.mark.parametrize("requirement", ["jax", "jax==0.10", "jax>=0.10,<1", "jax<1"])
def test_a_requirement_without_a_lower_bound_alone_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(requirement))):
        lower_bounds.lower_bounds([requirement])


def test_core_tests_need_no_more_than_they_install() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras["core-test"]) <= set(extras["test"])


# Tags -------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A folder whose files all name version 1.2.3."""
    (tmp_path / "ava_jax").mkdir()
    (tmp_path / "ava_jax" / "__init__.py").write_text('x = 1\n__version__ = "1.2.3"\n')
    log = "# Changelog\n\n## [Unreleased]\n\n## [1.2.3] - 2026-01-01\n\n## [1.2.2]\n"
    (tmp_path / "CHANGELOG.md").write_text(log)
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 1.2.3\n")
    return tmp_path


def test_a_tag_that_agrees_is_accepted(
    release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_release.check("v1.2.3", release)
    (release / "CITATION.cff").unlink()
    check_release.check("v1.2.3", release)
    assert "ava_jax/__init__.py, CHANGELOG.md, CITATION.cff" in capsys.readouterr().out


@pytest.mark.parametrize("tag", ["", "1.2.3", "v1.2", "v1.2.3rc1", "v1.2.4"])
def test_another_tag_is_refused(release: Path, tag: str) -> None:
    with pytest.raises(SystemExit, match="error: the tag is"):
        check_release.check(tag, release)


@pytest.mark.parametrize(
    "name", ["ava_jax/__init__.py", "CHANGELOG.md", "CITATION.cff"]
)
def test_a_file_of_another_version_is_named(release: Path, name: str) -> None:
    path = release / name
    path.write_text(path.read_text().replace("1.2.3", "1.3.0"))
    with pytest.raises(SystemExit, match=re.escape(f"{{'{name}': '1.3.0'}}")):
        check_release.check("v1.2.3", release)


def test_a_change_log_without_a_release_is_refused(release: Path) -> None:
    (release / "CHANGELOG.md").write_text("# Changelog\n\n## [Unreleased]\n")
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md names no version"):
        check_release.check("v1.2.3", release)


# Archives ---------------------------------------------------------------------------

METADATA = [f"a-1.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL")]


def wheel_of(folder: Path, names: list[str]) -> Path:
    path = folder / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in [*names, *METADATA]:
            archive.writestr(name, "")
    return path


def sdist_of(folder: Path, names: list[str]) -> Path:
    path = folder / "a-1.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in [*names, "PKG-INFO"]:
            archive.addfile(tarfile.TarInfo(f"a-1/{name}"), io.BytesIO())
    return path


@pytest.mark.parametrize("make", [wheel_of, sdist_of])
def test_archives_have_what_they_should_and_no_more(make, tmp_path: Path) -> None:
    archive = make(tmp_path, ["a/b.py", "a/py.typed"])
    check_package.check_files(archive, {"a/b.py", "a/py.typed"})
    with pytest.raises(SystemExit, match=r"lacks \['a/c.py'\] and has \[\]"):
        check_package.check_files(archive, {"a/b.py", "a/py.typed", "a/c.py"})
    with pytest.raises(SystemExit, match=r"lacks \[\] and has \['a/py.typed'\]"):
        check_package.check_files(archive, {"a/b.py"})


def test_a_command_that_fails_ends_the_check() -> None:
    with pytest.raises(SystemExit) as caught:
        check_package.run(sys.executable, "-c", "raise SystemExit(3)")
    assert caught.value.code == 3


def test_the_installed_package_is_not_the_checkout() -> None:
    with pytest.raises(SystemExit, match="error: ava_jax comes from"):
        try_installed.check_origin()


def test_every_module_has_its_doctests_run() -> None:
    paths = {str(module.__file__) for module in try_installed.modules()}
    assert paths == set(map(str, MODULES))


def test_the_snippet_is_the_one_under_use(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    block = "```python\n{}\n```\n"
    page.write_text(
        "# T\n\n" + block.format("1 / 0") + "\n## Use\n\n" + block.format("assert 0, 7")
    )
    with pytest.raises(AssertionError, match="7"):
        try_installed.run_snippet(page)
    page.write_text("# T\n\n## Use\n\nNothing.\n\n## B\n\n" + block.format("1 / 0"))
    with pytest.raises(SystemExit, match="no Python block"):
        try_installed.run_snippet(page)

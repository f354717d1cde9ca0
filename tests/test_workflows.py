"""What runs on the forge: the Makefile's targets, and nothing else of substance."""

import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yml"))
TEMPLATES = sorted((FORGE / "ISSUE_TEMPLATE").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKE = re.compile(r'make ([a-z-]+)(?: TAG="\$GITHUB_REF_NAME")?')
VARIABLE = re.compile(r"\$\{\{ matrix\.([a-z-]+) \}\}")


def jobs(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())["jobs"]


def variants(job: dict[str, Any]) -> Iterator[dict[str, str]]:
    """Yields each combination of a job's matrix."""
    matrix = job.get("strategy", {}).get("matrix", {})
    for values in itertools.product(*matrix.values()):
        yield dict(zip(matrix, values, strict=True))


def filled(value: Any, variant: dict[str, str]) -> Any:
    """Returns a part of a job with the values of the matrix put in."""
    if isinstance(value, dict):
        return {key: filled(each, variant) for key, each in value.items()}
    if isinstance(value, str):
        return VARIABLE.sub(lambda match: variant[match[1]], value)
    return value


def steps(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the steps of all variants of a job."""
    for variant in variants(job):
        yield from (filled(step, variant) for step in job["steps"])


def made_by(path: Path) -> set[str]:
    """Returns the make targets that a workflow runs."""
    commands = [
        step["run"]
        for job in jobs(path).values()
        for step in steps(job)
        if "run" in step
    ]
    matches = {command: MAKE.fullmatch(command) for command in commands}
    assert [c for c, match in matches.items() if match is None] == []
    return {match[1] for match in matches.values() if match is not None}


def targets() -> set[str]:
    """Returns the targets of the Makefile that are commands."""
    lines = (ROOT / "Makefile").read_text().replace("\\\n", " ").splitlines()
    phony = " ".join(line for line in lines if line.startswith(".PHONY:"))
    rules = {name for line in lines if line[:1].islower() for name in rule(line)}
    return set(phony.split()) & rules


def rule(line: str) -> list[str]:
    names, colon, rest = line.partition(":")
    return names.split() if colon and not rest.startswith("=") else []


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_only_targets_of_the_makefile(path: Path) -> None:
    assert made_by(path) - targets() == set()


def test_the_check_of_a_clean_machine_runs_targets_of_the_makefile() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    made = {MAKE.fullmatch(line) for line in lines if line.startswith("make")}
    assert {match[1] for match in made if match} - targets() == set()
    assert None not in made


def test_ci_makes_everything_that_a_release_promises() -> None:
    ci, release = (made_by(FORGE / "workflows" / f"{n}.yml") for n in ("ci", "release"))
    wanted = {"lint", "test", "test-lowest", "test-newest", "test-compiled"}
    wanted |= {"docs", "package"}
    assert wanted - ci == set()
    assert release == {"release-check", "package"}


def minor(version: str) -> tuple[int, int]:
    major, _, rest = version.partition(".")
    return int(major), int(rest)


def test_tests_run_on_every_python_that_the_project_names() -> None:
    prefix = "Programming Language :: Python :: 3."
    named = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if prefix in c]
    assert named == sorted(named, key=minor)
    assert PROJECT["requires-python"] == f">={named[0]}"
    all_jobs = jobs(FORGE / "workflows" / "ci.yml")
    for name in ("test", "versions"):
        assert all_jobs[name]["strategy"]["matrix"]["python-version"] == named
    # Numbers would turn 3.10 into 3.1.
    used = {
        step["with"]["python-version"]
        for path in WORKFLOWS
        for job in jobs(path).values()
        for step in steps(job)
        if step.get("uses", "").startswith("actions/setup-python@")
    }
    assert used == set(named)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_jobs_end(path: Path) -> None:
    for job in jobs(path).values():
        assert 0 < job["timeout-minutes"] <= 120
        for step in steps(job):
            assert ("run" in step) != ("uses" in step)
            assert re.fullmatch(r"[\w/-]+@(release/)?v\d+", step.get("uses", "a@v1"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_only_publishing_may_write_and_it_runs_no_code_of_ours(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is (path.stem == "ci")
    assert "secrets." not in path.read_text()
    for name, job in workflow["jobs"].items():
        if name == "publish":
            assert job["permissions"] == {"id-token": "write"}
            assert (job["environment"], job["needs"]) == ("pypi", "build")
            assert not any("run" in step for step in job["steps"])
        else:
            assert "permissions" not in job
            assert "environment" not in job


def test_a_release_starts_from_a_tag_alone() -> None:
    workflow = yaml.safe_load((FORGE / "workflows" / "release.yml").read_text())
    # YAML 1.1 reads the key `on` as true.
    assert workflow[True] == {"push": {"tags": ["v*"]}}


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_forms(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert form == {"blank_issues_enabled": True}
        return
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids) >= 3
    for field in form["body"]:
        assert field["type"] in ("input", "textarea")
        assert field["attributes"]["label"]
        assert field["validations"] == {"required": True}


def test_a_bug_is_asked_for_versions_config_and_example() -> None:
    form = yaml.safe_load((FORGE / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    asked = {field["id"] for field in form["body"]}
    assert {"versions", "config", "example"} <= asked

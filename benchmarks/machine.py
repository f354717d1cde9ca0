"""The machine and the package versions of a benchmark."""

import importlib.metadata
import os
import platform
import re
from pathlib import Path

import jax

from benchmarks.records import MachineRecord

PACKAGES = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "optax",
    "flax",
    "tokamax",
    "marin-levanter",
    "ava-jax",
)


def device_kind() -> str:
    """Returns the kind of the default device: `cpu`, or the accelerator's name."""
    return jax.devices()[0].device_kind


def machine() -> MachineRecord:
    """Returns the processor, its cores, the memory and the device."""
    return {
        "processor": _first("/proc/cpuinfo", r"model name\s*: (.+)")
        or platform.processor(),
        "cores": _cores(),
        "memory": _memory("MemTotal"),
        "device": device_kind(),
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of the relevant packages; `None` if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package.replace("-", "_")] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package.replace("-", "_")] = None
    return found


def default_name() -> str:
    """Returns a file name for this machine, such as `cpu2-jax0.10.2`."""
    kind = re.sub(r"[^a-z0-9]+", "-", device_kind().lower()).strip("-")
    device = "" if kind == "cpu" else f"{kind}-"
    return f"{device}cpu{_cores()}-jax{jax.__version__}"


def free_memory() -> int | None:
    """Returns the bytes of host memory that are still available, if known."""
    return _memory("MemAvailable")


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory(field: str) -> int | None:
    kibibytes = _first("/proc/meminfo", rf"{field}:\s*(\d+) kB")
    return int(kibibytes) * 1024 if kibibytes else None


def _first(path: str, pattern: str) -> str | None:
    if not Path(path).exists():
        return None
    found = re.search(pattern, Path(path).read_text())
    return found[1].strip() if found else None

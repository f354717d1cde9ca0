"""Flags with which XLA compiles for a CPU four times as fast, to slower programs.

Most of the suite's time is the compiler's: a program here runs a few times, on a few
numbers.
"""

import os
import subprocess
import sys

QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# What QUICK turns off of the programs themselves, for a single one of them.
AS_USERS_DO = {"xla_cpu_use_fusion_emitters": True}


def are_known(flags: str) -> bool:
    """Whether this XLA knows the flags: it ends a process that sets others."""
    parses_them = "from jaxlib import xla_client; xla_client.CompileOptions()"
    probe = subprocess.run(
        [sys.executable, "-c", parses_them],
        env=os.environ | {"XLA_FLAGS": flags},
        stderr=subprocess.DEVNULL,
        check=False,
    )
    return probe.returncode == 0


def with_quick(flags: str) -> str:
    """The flags and those of `QUICK`, where XLA knows them."""
    # Processes that the first one starts have them already.
    return flags if QUICK in flags or not are_known(QUICK) else f"{flags} {QUICK}"

"""Eight fake devices, strict promotion, and shapes checked against the annotations."""

import functools
import gc
import os
import types

from support import compiling

os.environ["XLA_FLAGS"] = (
    compiling.with_quick(os.environ.get("XLA_FLAGS", ""))
    + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from support import typechecking

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling costs far more than running at these sizes.
jax.config.update("jax_disable_most_optimizations", True)
# Nobody reads where the operations of these programs come from.
jax.config.update("jax_traceback_in_locations_limit", 0)

typechecking.install("ava_jax")

# Tracing makes many small objects, and little garbage: it is collected after a module.
gc.freeze()
gc.disable()


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Unmaps compiled programs: Linux allows a process 65,530 maps by default."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def here_alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Traces the program of the platform here, unless a test is of every platform.

    Only one of them runs, and tracing the others takes as long again.
    """
    if "every_platform" not in request.keywords:
        choose = types.SimpleNamespace(platform_dependent=lambda *x, cpu, **_: cpu(*x))
        monkeypatch.setattr("ava_jax.kernel.platforms.lax", choose)


@pytest.fixture
def optimized_text(monkeypatch: pytest.MonkeyPatch):
    """Optimizes programs as users do, for tests that read the compiled program's text.

    It shows all but the machine code, whose optimization takes as long again.
    """
    if compiling.QUICK in os.environ["XLA_FLAGS"]:
        jit = functools.partial(jax.jit, compiler_options=compiling.AS_USERS_DO)
        monkeypatch.setattr(jax, "jit", jit)


@pytest.fixture
def optimized(optimized_text: None):
    """Compiles as users do, for tests whose numbers depend on the machine code."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def unannotated():
    """Calls the package as users do, without the annotations' checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

"""Eight fake devices, strict promotion, and shapes checked against the annotations."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jaxtyping
import pytest
from support import typechecking

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Compiling costs far more than running at these sizes.
jax.config.update("jax_disable_most_optimizations", True)

jaxtyping.install_import_hook("ava_jax", f"{typechecking.__name__}.check")


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Unmaps compiled programs: Linux allows a process 65,530 maps by default."""
    yield
    jax.clear_caches()


@pytest.fixture
def optimized():
    """Compiles as users do, for tests that look at the compiled program."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def unannotated():
    """Calls the package as users do, without the annotations' checks."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)

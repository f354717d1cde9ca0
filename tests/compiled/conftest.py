"""Programs are compiled as users compile them."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def here_alone() -> None:
    """Nothing here is compiled for the platform here."""


@pytest.fixture(autouse=True)
def as_users_do(unannotated: None) -> Iterator[None]:
    """Optimized, without the annotations' checks, and with ordinary promotion."""
    del unannotated
    # The flags that compile quickly for a CPU say nothing to these compilers.
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.config.update("jax_disable_most_optimizations", True)

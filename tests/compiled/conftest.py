"""Programs are compiled as users compile them."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def as_users_do(optimized: None, unannotated: None) -> Iterator[None]:
    """Optimized, without the annotations' checks, and with ordinary promotion."""
    del optimized, unannotated
    with jax.numpy_dtype_promotion("standard"):
        yield

"""Other people's models run as their authors run them."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """The models, and optax's Adam, mix dtypes, which strict promotion refuses."""
    with jax.numpy_dtype_promotion("standard"):
        yield

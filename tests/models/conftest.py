"""Other people's models run as their authors run them."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """The models, and optax's Adam, mix dtypes, which strict promotion refuses.

    Set for all threads: Tunix samples in one of its own.
    """
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    yield
    jax.config.update("jax_numpy_dtype_promotion", "strict")

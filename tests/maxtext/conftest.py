"""MaxText runs as its authors run it."""

import os
from collections.abc import Iterator

import jax
import pytest

from benchmarks.maxtext_training import use_one_order

# MaxText connects to Google Cloud when it is imported, unless this is set.
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
use_one_order()


@pytest.fixture(autouse=True)
def as_maxtext_does() -> Iterator[None]:
    """With ordinary promotion of dtypes, which MaxText's arithmetic needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield

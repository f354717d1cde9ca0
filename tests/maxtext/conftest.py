"""MaxText runs as its authors run it."""

import os
from collections.abc import Iterator

import jax
import pytest

# MaxText connects to Google Cloud when it is imported, unless this is set.
os.environ.setdefault("DECOUPLE_GCLOUD", "TRUE")
# Fake devices may run collectives that do not depend on each other in different orders,
# and then wait for each other for ever. XLA reads its flags when the first one is used.
os.environ["XLA_FLAGS"] += " --xla_cpu_enable_concurrency_optimized_scheduler=false"


@pytest.fixture(autouse=True)
def as_maxtext_does() -> Iterator[None]:
    """With ordinary promotion of dtypes, which MaxText's arithmetic needs."""
    with jax.numpy_dtype_promotion("standard"):
        yield

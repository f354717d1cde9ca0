"""Eight fake devices, strict promotion, and shapes checked against the annotations."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

from tests import typechecking

jax.config.update("jax_numpy_dtype_promotion", "strict")

install_import_hook("ava_jax", f"{typechecking.__name__}.check")

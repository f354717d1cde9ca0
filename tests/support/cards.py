"""Meshes of GPUs that need not be present."""

import dataclasses

from jax.sharding import AbstractDevice, AbstractMesh


def mesh_of(card: str, size: int = 1) -> AbstractMesh:
    """Returns a mesh of one axis, `x`, of GPUs that are called so."""
    # In JAX 0.10.0 a device has no platform.
    values = {"device_kind": card, "num_cores": 132, "platform": "gpu"}
    known = {field.name for field in dataclasses.fields(AbstractDevice)}
    device = AbstractDevice(**{name: values[name] for name in known})
    return AbstractMesh((size,), ("x",), abstract_device=device)

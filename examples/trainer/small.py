"""A language model small enough for recipes that train in seconds: bytes, one layer."""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

VOCAB = 256
CONTEXT = 4
WIDTH = 64
Params = dict[str, Array]


def byte_rows(rows: int, length: int) -> Int[Array, "R S+1"]:
    """Returns rows of bytes from the source of Python's `argparse`."""
    raw = np.frombuffer(Path(argparse.__file__).read_bytes(), np.uint8)
    starts = np.linspace(0, len(raw) - length - 1, rows).astype(int)
    return jnp.asarray(np.stack([raw[s : s + length + 1] for s in starts]), jnp.int32)


def init_params(key: Array) -> Params:
    """Returns the parameters of the model."""
    shapes = {
        "embed": (VOCAB, WIDTH),
        "mix": (CONTEXT, WIDTH, WIDTH),
        "lm_head": (WIDTH, VOCAB),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.normal(key, shape) * shape[-2] ** -0.5
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def hidden_states(params: Params, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Mixes the embeddings of the last four tokens (Bengio et al. 2003)."""
    embedded = params["embed"][ids]
    length = ids.shape[1]
    past = [
        jnp.pad(embedded, ((0, 0), (back, 0), (0, 0)))[:, :length]
        for back in range(CONTEXT)
    ]
    return jnp.tanh(jnp.einsum("cbsd,cde->bse", jnp.stack(past), params["mix"]))

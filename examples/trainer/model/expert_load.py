"""The load of each expert: its share of the routing choices, times E."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

import ava_jax


def count_choices(inputs: ava_jax.LossInputs, experts: int) -> Int[Array, "L E"] | None:
    """Counts how often the tokens of a micro-batch chose each expert of each layer.

    Integers, so that micro-batches and devices add up exactly. Padding is left out.

    Args:
      inputs: what the model hands to the loss.
      experts: E.

    Returns:
      The counts; None for a model without experts.
    """
    chosen, unmasked = inputs.get("expert_indices"), inputs.get("attention_mask")
    if chosen is None or unmasked is None:
        return None
    is_expert = chosen[..., None] == jnp.arange(experts, dtype=chosen.dtype)
    counts = is_expert & unmasked.reshape(-1, 1, 1)
    return jnp.sum(counts, axis=(1, 2), dtype=jnp.int32)


def relative_load(choices: Int[Array, "L E"]) -> Float[Array, "L E"]:
    """Each expert's share of its layer's choices, times E: 1 is an even share.

    0 everywhere in a layer without choices.
    """
    total = jnp.sum(choices, axis=-1, keepdims=True).astype(jnp.float32)
    share = choices.astype(jnp.float32) / jnp.maximum(total, 1.0)
    return choices.shape[-1] * share

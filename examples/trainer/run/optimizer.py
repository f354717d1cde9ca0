"""The optimizer: AdamW, and the schedule of its learning rate."""

import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from trainer.run.settings import Settings


def make_optimizer(
    settings: Settings,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns AdamW with gradient clipping, and its warm-up and cosine schedule."""
    cosine = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.schedule_steps,
        end_value=settings.learning_rate / 10,
    )

    def schedule(count: jax.typing.ArrayLike) -> Array:
        # The first step is the first of the warm-up, not one with a rate of 0.
        return jnp.asarray(cosine(jnp.asarray(count) + 1))

    def is_matrix(path: jax.tree_util.KeyPath, leaf: Array) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        return name not in ("bias", "scale")

    adamw = optax.adamw(
        schedule,
        b2=0.95,
        weight_decay=settings.weight_decay,
        mask=functools.partial(jax.tree.map_with_path, is_matrix),
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw), schedule

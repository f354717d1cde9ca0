"""The training state and its sharding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Int

import ava_jax
from trainer.model.language_model import LanguageModel
from trainer.model.layers import Batch
from trainer.run.devices import placed
from trainer.run.guard import Skips
from trainer.run.optimizer import make_optimizer
from trainer.run.settings import Settings

COLUMNS = 128  # the vocabulary is padded to a multiple of this, which matrix units like


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: optax.Params
    optimizer: optax.OptState
    loss: ava_jax.LossState
    skipped: Skips


def make_model(settings: Settings, loss: ava_jax.UnifiedLossConfig) -> LanguageModel:
    """Returns the model, with the heads that its loss asks for."""
    return LanguageModel(
        config=settings.model,
        loss=loss,
        columns=-(-loss.vocab_size // COLUMNS) * COLUMNS,
        dtype=jnp.dtype(settings.dtype),
        fused=settings.fused,
    )


# Not traced anew by each call: a run asks for the shapes twice, then for the state.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def init_state(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss
) -> TrainState:
    """Returns the state before the first step."""
    row = jnp.ones((1, settings.sequence_length), jnp.int32)
    variables = model.init(jax.random.key(settings.seed), Batch(row, row, row, row))
    optimizer, _ = make_optimizer(settings)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        optimizer=optimizer.init(variables["params"]),
        loss=loss_fn.init(),
        skipped=Skips.none(),
    )


def state_shapes(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss, mesh: Mesh
) -> TrainState:
    """Returns the state's shapes and dtypes, each with its sharding on the mesh."""
    return placed(init_state.eval_shape(settings, model, loss_fn), mesh)


def init_sharded(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss, mesh: Mesh
) -> TrainState:
    """Returns the state before the first step, each array made where it belongs."""
    shapes = state_shapes(settings, model, loss_fn, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    make = functools.partial(init_state, settings, model, loss_fn)
    return jax.jit(make, out_shardings=shardings)()

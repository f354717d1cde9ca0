"""MaxText's models, batches and losses, for the tests of the adapter."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.linen import logical_axis_rules

from benchmarks import maxtext_training
from benchmarks.maxtext_training import Options, Settings

REASON = "needs the maxtext extra; `make test-maxtext` installs it and runs these tests"
ROWS, LENGTH = 8, 32
SMALL: Settings = {
    **maxtext_training.TINY,
    "base_num_decoder_layers": 1,
    "num_vocab_tiling": maxtext_training.TILES,
    "dataset_type": "synthetic",
    "enable_checkpointing": "false",
    "run_name": "test",
}

Batch = Mapping[str, jax.Array]
# From a model, its last hidden states, a batch, the config and whether it trains.
Hook = Callable[[Any, jax.Array, Batch, Any, bool], tuple[jax.Array, jax.Array]]


class Made(NamedTuple):
    """A model of MaxText's with its config and a loss for it."""

    config: Any
    model: Any
    hook: Hook


class Result(NamedTuple):
    """What a hook returns, its gradients, and the loss's state after it."""

    total: jax.Array
    z_loss: jax.Array
    params: nnx.State
    hidden: jax.Array
    state: Any


@contextlib.contextmanager
def as_in_training(config: Any, mesh: jax.sharding.Mesh) -> Iterator[None]:
    with jax.set_mesh(mesh), logical_axis_rules(config.logical_axis_rules):
        yield


def make(options: Options | None, **settings: Any) -> Made:
    """A model, the same one for the same settings; None gives it MaxText's loss."""
    pyconfig = importlib.import_module("maxtext.configs.pyconfig")
    models = importlib.import_module("maxtext.utils.model_creation_utils")
    folder = importlib.import_module("maxtext").__path__[0]
    base = str(Path(folder) / "configs" / "base.yml")
    arguments = [f"{k}={v}" for k, v in {**SMALL, **settings}.items()]
    config = pyconfig.initialize(["", base, *arguments])
    mesh = importlib.import_module("maxtext.utils.maxtext_utils").get_mesh_from_config(
        config
    )
    train = importlib.import_module("maxtext.trainers.pre_train.train")
    with maxtext_training.installed(options), as_in_training(config, mesh):
        model = models.from_config(config, mesh=mesh, rngs=nnx.Rngs(0))
        hook = own_loss if options is None else train.vocab_tiling_nnx_loss
    return Made(config, model, hook)


def own_loss(
    model: Any, hidden: jax.Array, data: Batch, config: Any, is_train: bool
) -> tuple[jax.Array, jax.Array]:
    """MaxText's loss without tiling, from `train.loss_fn`."""
    del is_train
    utils = importlib.import_module("maxtext.utils.max_utils")
    logits = model.logits_from_hidden_states_for_vocab_tiling(hidden, True, "train")
    one_hot = jax.nn.one_hot(data["targets"], config.vocab_size)
    xent, z_loss = utils.cross_entropy_with_logits(
        logits, one_hot, z_loss=config.z_loss_multiplier
    )
    unmasked = data["targets_segmentation"] != 0
    return jnp.sum(xent * unmasked), jnp.sum(z_loss * unmasked)


def batch(vocab: int = 512, *, seed: int = 0) -> Batch:
    """Rows of two or three documents and padding; targets that repeat."""
    targets = jax.random.randint(jax.random.key(seed), (ROWS, LENGTH), 0, vocab)
    # Every other row says a phrase again and again.
    targets = targets.at[::2].set(jnp.tile(targets[::2, :4], (1, LENGTH // 4)))
    index, row = jnp.arange(LENGTH), jnp.arange(ROWS)[:, None]
    segments = 1 + (index >= 9 + row).astype(int) + (index >= 20).astype(int)
    return {
        "targets": targets,
        "targets_segmentation": jnp.where(index < LENGTH - row, segments, 0),
    }


def hidden_states(*, seed: int = 1) -> jax.Array:
    width = int(SMALL["base_emb_dim"])
    return jax.random.normal(jax.random.key(seed), (ROWS, LENGTH, width))


def call(made: Made, data: Batch, hidden: jax.Array, is_train: bool = True) -> Result:
    """Calls a hook as MaxText's train step does, compiled and differentiated."""
    graph, params, rest = nnx.split(made.model, nnx.Param, ...)

    def total(params: nnx.State, hidden: jax.Array):
        model = nnx.merge(graph, params, rest, copy=True)
        loss, z_loss = made.hook(model, hidden, data, made.config, is_train)
        state = getattr(model, "loss_state", None)
        return loss, (z_loss, None if state is None else state.get_value())

    step = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
    with as_in_training(made.config, made.model.mesh):
        (loss, (z_loss, state)), (of_params, of_hidden) = step(params, hidden)
    return Result(loss, z_loss, of_params, of_hidden, state)

"""What the tests of other people's models share: batches, loss lines, comparisons.

Each test file gives a `Trainer`: the model's ordinary training loop, with the loss line
as an argument.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from numpy.typing import NDArray

import ava_jax
from ava_jax.heads import MTPHeads
from ava_jax.unified import UnifiedLoss

REASON = "needs the models extra; `make test-models` installs it and runs these tests"
V, D, B, S, K = 97, 32, 4, 16, 2
STEPS = 30
EOS = 0

PLAIN = {
    "vocab_size": V,
    "primary_loss_type": "standard",
    "label_smoothing": 0.0,
    "use_ngram_penalty": False,
    "use_immediate_repetition_penalty": False,
}
EVERYTHING = {
    "vocab_size": V,
    "hidden_size": D,
    "primary_loss_type": "deepseek",
    "z_loss_weight": 1e-4,
    "unlikelihood_weight": 0.1,
    "ngram_size": 2,
    "eos_token_id": EOS,
    "min_sequence_length": S // 2,
    "use_mtp": True,
    "num_future_tokens": K,
    "use_contrastive_loss": True,
    "contrastive_type": "simctg",
}
TERMS = (
    "main_loss",
    "z_loss",
    "mtp_loss",
    "ngram_repetition",
    "token_diversity",
    "immediate_repetition_penalty",
    "eos_penalty",
    "unlikelihood",
    "contrastive_loss",
)

Line = Callable[..., tuple[jax.Array, dict[str, jax.Array], Any]]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a model is trained.

    Attributes:
      path: what the loss line gets: the model's logits, or its hidden states and head.
      masked: whether rows end in padding, from which nothing is learnt.
      dtype: of the weights and of the computation.
      tied: whether the head is the embedding.
      mtp: whether `MTPHeads` are trained along.
      learning_rate: Adam's.
    """

    path: Literal["logits", "fused"] = "logits"
    masked: bool = False
    dtype: Literal["float32", "float64"] = "float32"
    tied: bool = False
    mtp: bool = False
    learning_rate: float = 1e-3

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """Adam, with its own epsilon in float64.

        Adam divides a gradient by its size. Where the gradient is nothing but rounding,
        as for a key's bias, which softmax cancels, it takes full steps into a random
        direction: with epsilon 1e-8, two of optax's own cross-entropies leave that bias
        1e-5 apart in float32. A larger epsilon leaves rounding as small as it is.
        """
        epsilon = {"float32": 1e-5, "float64": 1e-8}[self.dtype]
        return optax.adam(self.learning_rate, eps=epsilon)


PLAIN_SETTINGS = pytest.mark.parametrize(
    "setting",
    [
        pytest.param(Setting(), id="logits"),
        pytest.param(Setting("fused", tied=True, masked=True), id="fused"),
        pytest.param(Setting(tied=True, masked=True, dtype="float64"), id="logits64"),
        pytest.param(Setting("fused", dtype="float64"), id="fused64"),
    ],
)
EVERYTHING_SETTINGS = pytest.mark.parametrize(
    "setting",
    [
        pytest.param(Setting(masked=True, mtp=True, learning_rate=1e-2), id="logits"),
        pytest.param(
            Setting("fused", tied=True, mtp=True, learning_rate=1e-2), id="fused"
        ),
    ],
)
# What Tunix calls, JAX, Flax and optax deprecate. The second is Flax's own doing.
TUNIX_WARNINGS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:tunix",
    "ignore:'sharding' is deprecated:DeprecationWarning:flax",
    "ignore:optax.global_norm:DeprecationWarning",
    "ignore:.with mesh:DeprecationWarning",
)


class Batch(NamedTuple):
    """Token ids [B, S+1], and a weight for each."""

    ids: jax.Array
    mask: jax.Array


class Run(NamedTuple):
    """What came of a training run: by step, and at its end."""

    losses: NDArray
    aux: list[dict[str, NDArray]]
    params: dict[str, NDArray]
    state: Any


class Trainer(Protocol):
    """Trains a fresh model for `STEPS` steps.

    `line(state, ids, mask, **outputs)` is the loss line. Its outputs are the loss's
    arguments, by the path, with `mtp_params` where the setting has them.
    """

    def __call__(self, line: Line, state: Any, setting: Setting) -> Run: ...


def nnx_trainer(
    make: Callable[[Setting], Any],
    outputs_of: Callable[[Any, Batch, Setting], dict[str, Any]],
) -> Trainer:
    """The training loop of an NNX model; `outputs_of` is what the loss line gets."""

    def train(line: Line, state: Any, setting: Setting) -> Run:
        model = make(setting)
        optimizer = nnx.Optimizer(model, setting.optimizer, wrt=nnx.Param)

        @nnx.jit
        def step(model: Any, optimizer: Any, state: Any, batch: Batch) -> Any:
            def objective(model: Any) -> Any:
                outputs = outputs_of(model, batch, setting)
                loss, aux, new_state = line(state, *batch, **outputs)
                return loss, (aux, new_state)

            graded = nnx.value_and_grad(objective, has_aux=True)
            (loss, (aux, new_state)), grads = graded(model)
            optimizer.update(model, grads)
            return new_state, (loss, aux)

        history = []
        for number in range(STEPS):
            batch = batch_of(number, setting)
            state, reported = step(model, optimizer, state, batch)
            history.append(reported)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return run_of(history, params, state)

    return train


def batch_of(step: int, setting: Setting) -> Batch:
    """One of two batches in turn; the end of a row repeats its start, doubly."""
    ids = np.random.default_rng(step % 2).integers(1, V, (B, S + 1))
    ids[:, -6:-1:2] = ids[:, -5::2] = ids[:, :3]
    ids[0, 3] = EOS
    lengths = [S + 1, 5, 9, 12] if setting.masked else [S + 1]
    mask = np.arange(S + 1) < np.reshape(lengths, (-1, 1))
    return Batch(jnp.asarray(ids), jnp.asarray(np.broadcast_to(mask, ids.shape)))


def mtp_params() -> Mapping[str, Any]:
    """Fresh parameters of the heads."""
    heads = MTPHeads(num_heads=K, vocab_size=V)
    return heads.init(jax.random.key(1), jnp.zeros((1, 1, D)))["params"]


def by_path(params: Any) -> dict[str, NDArray]:
    """The leaves of a tree, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def run_of(history: list[tuple[Any, Any]], params: Any, state: Any) -> Run:
    """Gathers a run from the steps' (loss, aux)."""
    losses = np.array([float(loss) for loss, _ in history])
    aux = [
        {name: np.asarray(x) for name, x in reported.items()} for _, reported in history
    ]
    return Run(losses, aux, by_path(params), state)


# The loss lines ------------------------------------------------------------------


def optax_line(state: Any, ids: jax.Array, mask: jax.Array, logits: jax.Array) -> Any:
    """The loss that the models are usually trained with."""
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
    return jnp.mean(nll, where=mask[:, 1:]), {}, state


def ava_line(loss_fn: UnifiedLoss) -> Line:
    """The line that takes its place."""

    def line(state: Any, ids: jax.Array, mask: jax.Array, **outputs: Any) -> Any:
        targets, mask = ids[:, 1:], mask[:, 1:]
        return loss_fn(state, targets=targets, attention_mask=mask, **outputs)

    return line


def train_with(
    train: Trainer, config: Mapping[str, Any], setting: Setting, **overrides: Any
) -> Run:
    """Trains under the unified loss of a config."""
    with jax.enable_x64(setting.dtype == "float64"):
        loss_fn = ava_jax.create_unified_loss(config, **overrides)
        return train(ava_line(loss_fn), loss_fn.init(), setting)


@functools.cache
def train_with_optax(train: Trainer, setting: Setting) -> Run:
    """Trains as usual: the reference."""
    with jax.enable_x64(setting.dtype == "float64"):
        return train(optax_line, None, dataclasses.replace(setting, path="logits"))


# The checks ----------------------------------------------------------------------


def check_plain_is_optax(train: Trainer, setting: Setting, **overrides: Any) -> None:
    """Every loss, and the parameters at the end, are those of optax within 1e-6.

    In float32 the losses are so relatively: where they are 4.6, neighbouring numbers
    lie 5e-7 apart, and two of optax's own cross-entropies differ by 1.4e-6.
    """
    reference = train_with_optax(train, setting)
    assert reference.losses[-1] < 0.95 * reference.losses[0]
    assert {x.dtype for x in reference.params.values()} == {np.dtype(setting.dtype)}
    run = train_with(train, PLAIN, setting, **overrides)
    scale = reference.losses if setting.dtype == "float32" else 1.0
    assert (abs(run.losses - reference.losses) < 1e-6 * scale).all()
    for name, gap in gaps(run, reference).items():
        assert gap < 1e-6, name


def check_smoothing_gets_mesh_apart(train: Trainer) -> None:
    """The comparison is not blind: label smoothing alone is far off."""
    run = train_with(train, PLAIN, Setting(), label_smoothing=0.1)
    reference = train_with_optax(train, Setting())
    assert abs(run.losses - reference.losses).max() > 1e-2
    assert max(gaps(run, reference).values()) > 1e-3


def gaps(run: Run, reference: Run) -> dict[str, float]:
    """How far each parameter is from the reference's."""
    assert set(run.params) == set(reference.params)
    return {
        name: abs(run.params[name] - x).max() for name, x in reference.params.items()
    }


def check_everything_learns(train: Trainer, setting: Setting) -> None:
    """With every term on, the loss falls and every number is finite."""
    run = train_with(train, EVERYTHING, setting)
    first, last = run.aux[0], run.aux[-1]
    for name in TERMS:
        assert first[name] > 0, name
    for name in ("total_loss", "nll", "mtp_loss"):
        assert last[name] < 0.7 * first[name], name
    for step in run.aux:
        assert all(np.isfinite(x).all() for x in step.values())
    assert all(np.isfinite(x).all() for x in run.params.values())
    assert int(run.state.step) == STEPS
    assert run.state.temperature != 1

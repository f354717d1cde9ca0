"""Training one variant, and the measurements that all experiments share.

Variants of one experiment and seed have the same initial weights, the same rows in the
same order and the same number of steps.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sized
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import ava_jax
from ava_jax import metrics
from experiments.sizes import Sizes
from experiments.variants import OwnParams, StepContext, Variant
from trainer.data.corpus import Corpus, load_corpus
from trainer.data.text import TextData, prepare_data
from trainer.decode.decoder import Decoder
from trainer.model.expert_load import count_choices, relative_load
from trainer.model.language_model import (
    LanguageModel,
    hidden_and_head,
    loss_inputs,
)
from trainer.model.layers import Batch
from trainer.model.temperature import fold_own_temperature, is_tempered
from trainer.run.devices import make_mesh
from trainer.run.evaluate import evaluate as evaluate_rows
from trainer.run.evaluate import routing_bias
from trainer.run.optimizer import make_optimizer
from trainer.run.settings import Settings
from trainer.run.state import make_model

CACHE = Path(__file__).resolve().parent.parent / ".cache"
TABLES = ("Python Character Mapping Codec", "HTML character entity references")
# Points of a path over training that are kept.
POINTS = 60

T = TypeVar("T")
Numbers = dict[str, float]
Paths = dict[str, list[object]]


class Trained(NamedTuple):
    """A trained variant.

    Attributes:
      model: the model.
      params: its parameters.
      state: of the loss.
      paths: reports over training, thinned; `step` says where.
      step_milliseconds: median time of a step.
    """

    model: LanguageModel
    params: optax.Params
    state: ava_jax.LossState
    paths: Paths
    step_milliseconds: float

    @property
    def bias(self) -> Float[Array, "L E"] | None:
        """The bias of the routers."""
        return routing_bias(self.state)


def load_text(sizes: Sizes) -> TextData:
    """Returns the standard library's source, without its generated tables."""
    corpus = without_tables(load_corpus(None))
    return prepare_data(corpus, CACHE, sizes.vocab_size, sizes.length, sizes.heldout)


def without_tables(corpus: Corpus) -> Corpus:
    """Leaves out the documents that are tables of characters.

    They are a sixth of the text, repeat themselves by design, and would decide the
    figures of whatever held-out rows they fall into.
    """
    kept = tuple(
        document
        for document in corpus.documents
        if not any(title in document[:100] for title in TABLES)
    )
    digest = hashlib.sha256("\0".join(kept).encode())
    return dataclasses.replace(
        corpus,
        documents=kept,
        sha256=digest.hexdigest(),
        size=sum(len(document.encode()) for document in kept),
    )


def spread_rows(rows: Sized, count: int) -> list[int]:
    """Returns the numbers of `count` rows, spread evenly over all documents.

    Raises:
      ValueError: there are fewer.
    """
    if len(rows) < count:
        raise ValueError(
            f"{count} held-out rows are wanted, but there are {len(rows)}: raise "
            "`heldout`"
        )
    return np.linspace(0, len(rows) - 1, count).round().astype(int).tolist()


def settings_of(sizes: Sizes) -> Settings:
    """Returns the trainer's settings of these sizes."""
    return Settings(
        model=sizes.model,
        dtype=sizes.dtype,
        # At this vocabulary the logits are small, and whole they are faster on a CPU.
        fused=False,
        learning_rate=sizes.learning_rate,
        warmup_steps=sizes.warmup,
        schedule_steps=sizes.steps,
        steps=sizes.steps,
    )


def build(sizes: Sizes, variant: Variant, text: TextData) -> LanguageModel:
    """Returns the model that a variant trains."""
    model = make_model(settings_of(sizes), variant.config(sizes, text))
    return model.clone(confidence_threshold=variant.confidence_threshold)


class Params(NamedTuple):
    """All trained parameters: of the model and of the additions."""

    model: optax.Params
    own: dict[str, OwnParams]


class Learner(NamedTuple):
    """What a step changes."""

    params: Params
    optimizer: optax.OptState
    state: ava_jax.LossState


def initial_params(model: LanguageModel, seed: int) -> optax.Params:
    """Returns the parameters before the first step."""
    row = jnp.ones((1, 8), jnp.int32)
    return model.init(jax.random.key(seed), Batch(row, row, row, row))["params"]


def _begin(
    model: LanguageModel,
    variant: Variant,
    optimizer: optax.GradientTransformation,
    seed: int,
) -> Learner:
    """The learner before the first step; the transformer depends on the seed alone."""
    own = {addition.name: addition.init() for addition in variant.additions}
    params = Params(initial_params(model, seed), own)
    state = ava_jax.unified_loss(model.loss).init()
    return Learner(params, optimizer.init(params), state)


Advance = Callable[[Learner, Batch, Int[Array, ""]], tuple[Learner, dict[str, Array]]]


def make_advance(
    sizes: Sizes, variant: Variant, model: LanguageModel, seed: int
) -> Advance:
    """Returns a jitted training step of a variant."""
    optimizer, _ = make_optimizer(settings_of(sizes))
    loss_fn = ava_jax.unified_loss(model.loss)

    def objective(
        params: Params,
        state: ava_jax.LossState,
        batch: Batch,
        step: Int[Array, ""],
    ) -> tuple[Array, tuple[dict[str, Array], ava_jax.LossState]]:
        bias, key = routing_bias(state), jax.random.fold_in(jax.random.key(seed), step)
        inputs = loss_inputs(model, params.model, batch, bias)
        loss, aux, state = loss_fn(state, **loss_fn.select(inputs))
        report = dict(aux)
        context = StepContext(model, params.model, batch, inputs, aux, bias, step, key)
        for addition in variant.additions:
            loss, more = addition.apply(params.own[addition.name], loss, context)
            report |= more
        choices = count_choices(inputs, sizes.model.experts)
        if choices is not None:
            report["expert_load"] = relative_load(choices)
        return loss, (report, state)

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(
        learner: Learner, batch: Batch, step: Int[Array, ""]
    ) -> tuple[Learner, dict[str, Array]]:
        grads, (report, state) = jax.grad(objective, has_aux=True)(
            learner.params, learner.state, batch, step
        )
        updates, moments = optimizer.update(grads, learner.optimizer, learner.params)
        params = cast(Params, optax.apply_updates(learner.params, updates))
        return Learner(params, moments, state), report

    return advance


def train(sizes: Sizes, variant: Variant, seed: int, text: TextData) -> Trained:
    """Trains a variant from its initial weights to the last step."""
    model = build(sizes, variant, text)
    optimizer, _ = make_optimizer(settings_of(sizes))
    advance = make_advance(sizes, variant, model, seed)
    learner = jax.jit(functools.partial(_begin, model, variant, optimizer, seed))()
    feed, every = text.batches(sizes.rows, seed), max(1, sizes.steps // POINTS)
    paths: Paths = {"step": []}
    seconds: list[float] = []
    for step in range(sizes.steps):
        batch = Batch(*map(jnp.asarray, next(feed)))
        begun = time.perf_counter()
        learner, report = advance(learner, batch, jnp.asarray(step, jnp.int32))
        jax.block_until_ready(learner)
        seconds.append(time.perf_counter() - begun)
        if (step + 1) % every == 0:
            _append(paths, step + 1, report)
    return Trained(
        model,
        learner.params.model,
        learner.state,
        paths,
        1000 * float(np.median(seconds)),
    )


def _append(paths: Paths, step: int, report: Mapping[str, Array]) -> None:
    paths["step"].append(step)
    for name, value in report.items():
        paths.setdefault(name, []).append(np.asarray(value).round(5).tolist())


def add_up(parts: Iterable[T]) -> T:
    """Adds up pytrees of arrays, entry by entry."""
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)


def heldout_batches(sizes: Sizes, text: TextData) -> list[Batch]:
    """Returns the batches that every variant is evaluated on."""
    size = sizes.rows
    numbers = spread_rows(text.heldout, size * sizes.heldout_batches)
    parts = (numbers[at : at + size] for at in range(0, len(numbers), size))
    return [Batch(*map(jnp.asarray, text.heldout.read(part))) for part in parts]


def evaluate(sizes: Sizes, trained: Trained, text: TextData) -> Numbers:
    """Returns the trainer's held-out figures, and the calibration error.

    What is `tempered` is at the model's own temperature, and otherwise at 1. A model
    without one has the same figures twice.
    """
    model, params = trained.model, trained.params
    batches = heldout_batches(sizes, text)
    mesh = make_mesh("data=1", sizes.rows)
    found = evaluate_rows(model, params, trained.state, batches, mesh)
    found["calibration_error"] = _calibration_error(model, params, trained, batches)
    own = fold_own_temperature(model, params, trained.state)
    tempered = {"calibration_error": found["calibration_error"]}
    if is_tempered(model.loss):
        tempered = {"calibration_error": _calibration_error(*own, trained, batches)}
    for name in ("nll", "perplexity"):
        tempered[name] = found.get(f"tempered_{name}", found[name])
    return found | {f"tempered_{name}": value for name, value in tempered.items()}


def _calibration_error(
    model: LanguageModel,
    params: optax.Params,
    trained: Trained,
    batches: Iterable[Batch],
) -> float:
    """Returns the expected calibration error of a model at temperature 1."""
    decoder = Decoder(model)

    @jax.jit
    def calibrate(params: optax.Params, batch: Batch) -> metrics.CalibrationBins:
        hidden, _ = hidden_and_head(model, params, batch, trained.bias)
        shares = jax.nn.softmax(decoder.logits(params, hidden))
        right = jnp.argmax(shares, -1) == batch.targets
        unmasked = batch.segment_ids > 0
        return metrics.calibration_bins(jnp.max(shares, -1), right, unmasked)

    bins = add_up(calibrate(params, batch) for batch in batches)
    return float(metrics.expected_calibration_error(bins))


class Prompts(NamedTuple):
    """Held-out prompts and the text that follows; each within one document."""

    prompts: Int[Array, "N P"]
    continuations: Int[Array, "N C"]


def heldout_prompts(sizes: Sizes, text: TextData) -> Prompts:
    """Returns the prompts, from rows spread over all that have one.

    Raises:
      ValueError: there are too few held-out rows.
    """
    cut, wanted = sizes.prompt_length, sizes.prompt_length + sizes.continuation
    rows = (text.heldout[number] for number in range(len(text.heldout)))
    whole = [row.inputs[:wanted] for row in rows if row.segment_ids[wanted - 1] == 1]
    numbers = spread_rows(whole, sizes.prompts)
    ids = jnp.asarray(np.stack([whole[number] for number in numbers]))
    return Prompts(ids[:, :cut], ids[:, cut:])

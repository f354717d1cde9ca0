"""Trains a small language model on real text under the unified loss.

    python examples/train_tpu.py --preset demo
    python examples/train_tpu.py --help

It reads from top to bottom: the step, the run, the loop. The same file runs on a
laptop's CPU, on GPUs and on a TPU pod, where it is started once per host;
`python -m trainer.run.launch_local` starts several processes on one machine. Exit code
0: done, or stopped by Ctrl-C or SIGTERM with everything saved. 1: an error, explained
on stderr. 130: Ctrl-C outside of training, or a second one during it.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int
from rich.console import Console

import ava_jax
from trainer.data.corpus import load_corpus
from trainer.data.text import prepare_data
from trainer.decode.decoder import Sampling, generate
from trainer.errors import TrainingError
from trainer.files import write_whole, writing
from trainer.model.expert_load import count_choices, relative_load
from trainer.model.language_model import LanguageModel, loss_inputs
from trainer.model.layers import Batch
from trainer.report.metrics import Metrics, append_record, read_records, steps_of
from trainer.report.plot import plot_losses
from trainer.report.progress import show_paths, show_table
from trainer.report.recorder import Recorder
from trainer.report.samples import Sample, keep_sample
from trainer.run.checkpoint import Checkpoints
from trainer.run.compile_for import Plan, compile_for
from trainer.run.devices import (
    ROWS,
    RowShare,
    loss_on,
    make_mesh,
    placed,
    use_deterministic_operations,
)
from trainer.run.evaluate import evaluate, routing_bias
from trainer.run.folder import open_run, refuse_other_data
from trainer.run.guard import Skips, choose, is_finite
from trainer.run.optimizer import make_optimizer
from trainer.run.processes import (
    first_failure,
    from_first,
    is_first,
    join_pod,
    run_to_the_end,
)
from trainer.run.settings import LossFields, Settings, make_loss_config, parse_settings
from trainer.run.stopping import StopRequest


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: optax.Params
    optimizer: optax.OptState
    loss: ava_jax.LossState
    skipped: Skips


class StepSums(NamedTuple):
    """What the micro-batches of a step add up to, besides the gradient."""

    stats: ava_jax.StepStats
    choices: Int[Array, "L E"] | None


# Sampling keeps to the likeliest tokens: label smoothing spreads mass over all others.
CANDIDATES = 40
COLUMNS = 128  # the vocabulary's come in multiples of this, as matrix units like them

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Gradient = Callable[[TrainState, Batch], tuple[optax.Params, StepSums]]


def split(batch: Batch, parts: int, mesh: Mesh) -> Batch:
    """Splits rows [B, S] into micro-batches [parts, B / parts, S].

    Row b goes to part b % parts, so that no row leaves its device.
    """
    rows_in_place = NamedSharding(mesh, P(None, ROWS))

    def part(array: Array) -> Array:
        window = array.reshape(-1, parts, array.shape[-1]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(window, rows_in_place)

    return Batch(*map(part, batch))


def make_gradient(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss, mesh: Mesh
) -> Gradient:
    """The gradient of a batch and its sums, added up over the micro-batches."""

    def micro_loss(
        params: optax.Params,
        state: ava_jax.LossState,
        micro: Batch,
        given: ava_jax.Normalizers,
    ) -> tuple[Array, StepSums]:
        inputs = loss_inputs(model, params, micro, routing_bias(state))
        with jax.named_scope("loss"):
            loss, _, stats = loss_fn.accumulate(state, normalizers=given, **inputs)
        return loss, StepSums(stats, count_choices(inputs, model.config.experts))

    def gradient(state: TrainState, batch: Batch) -> tuple[optax.Params, StepSums]:
        window = split(batch, settings.microbatches, mesh)
        normalizers = loss_fn.normalizers(
            targets=window.targets,
            attention_mask=window.segment_ids > 0,
            segment_ids=window.segment_ids,
        )

        def add(grads: optax.Params, micro: Batch) -> tuple[optax.Params, StepSums]:
            own = jax.grad(micro_loss, has_aux=True)
            more, sums = own(state.params, state.loss, micro, normalizers)
            return jax.tree.map(jnp.add, grads, more), sums

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, sums = jax.lax.scan(add, zeros, window)
        return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), sums)

    return gradient


def make_train_step(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss, mesh: Mesh
) -> TrainStep:
    """One optimizer step: a single jitted, donated function.

    A step whose loss, gradient or new parameters are not finite is skipped: all stays
    as it was, but for the step's number and the counts of skipped steps.
    """
    optimizer, schedule = make_optimizer(settings)
    gradient = make_gradient(settings, model, loss_fn, mesh)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        grads, (stats, choices) = gradient(state, batch)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        grad_norm = optax.tree.norm(grads)
        is_good = is_finite((stats.aux["total_loss"], grad_norm, params))
        skipped = state.skipped.after(is_good)
        new = TrainState(
            step=state.step + 1,
            params=choose(is_good, params, state.params),
            optimizer=choose(is_good, moments, state.optimizer),
            loss=choose(is_good, loss_fn.commit(state.loss, stats), state.loss),
            skipped=skipped,
        )
        metrics = loss_fn.summary(new.loss, stats) | {
            "learning_rate": schedule(state.step - state.skipped.total),
            "grad_norm": grad_norm,
            "skipped_steps": skipped.total,
            "skipped_in_a_row": skipped.in_a_row,
        }
        if choices is not None:
            metrics["expert_load"] = relative_load(choices)
        return new, Metrics.pack(metrics)

    state = jax.tree.map(
        lambda leaf: leaf.sharding, state_shapes(settings, model, loss_fn, mesh)
    )
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(state, NamedSharding(mesh, P()))
    )


def make_model(settings: Settings, loss: ava_jax.UnifiedLossConfig) -> LanguageModel:
    """The model, with the heads that its loss asks for."""
    return LanguageModel(
        config=settings.model,
        loss=loss,
        columns=-(-loss.vocab_size // COLUMNS) * COLUMNS,
        dtype=jnp.dtype(settings.dtype),
        fused=settings.fused,
    )


def new_state(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss
) -> TrainState:
    """The state before the first step."""
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
    """The state's shapes and dtypes, with where each array lies on the mesh."""
    make = functools.partial(new_state, settings, model, loss_fn)
    return placed(jax.eval_shape(make), mesh)


def plan(settings: Settings, loss: ava_jax.UnifiedLossConfig, mesh: Mesh) -> Plan:
    """The step and its arguments as shapes, for a compiler without a device."""
    model, loss_fn = make_model(settings, loss), loss_on(mesh, loss)
    shape = settings.batch_size, settings.sequence_length
    where = NamedSharding(mesh, P(ROWS))
    rows = cast(Array, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where))
    state = state_shapes(settings, model, loss_fn, mesh)
    step = cast(jax.stages.Wrapped, make_train_step(settings, model, loss_fn, mesh))
    return Plan(step, state, state.params, state.optimizer, Batch(*[rows] * 4))


class Run:
    """One call of the trainer: everything built, restored if the folder has a run."""

    def __init__(
        self, settings: Settings, fields: LossFields, console: Console
    ) -> None:
        corpus = load_corpus(settings.data)
        console.print(corpus.describe(), highlight=False, soft_wrap=True)
        refuse_other_data(settings.out, corpus)
        text = prepare_data(
            corpus,
            settings.cache,
            settings.vocab_size,
            settings.sequence_length,
            settings.heldout,
        )
        loss = make_loss_config(settings, fields, text.vocab_size, text.eos)
        open_run(settings, loss, corpus)
        self.settings, self.console, self.text = settings, console, text
        if is_first():
            write_whole(settings.out / "tokenizer.json", text.tokenizer.to_str())
        self.mesh = make_mesh(
            settings.mesh, settings.batch_size // settings.microbatches
        )
        self.model = make_model(settings, loss)
        self.loss_fn = loss_on(self.mesh, loss)
        self.train_step = make_train_step(settings, self.model, self.loss_fn, self.mesh)
        self.checkpoints = Checkpoints(settings.out / "checkpoints", settings.keep)
        self.share = RowShare(self.mesh, settings.batch_size)
        self.batches = text.batches(
            settings.batch_size, settings.seed, self.share.places
        )
        self.state = self._begin()
        self.start = self.step = int(self.state.step)
        self.describe()

    def _begin(self) -> TrainState:
        """The state of the newest checkpoint, or a new one."""
        parts = self.settings, self.model, self.loss_fn
        target = state_shapes(*parts, self.mesh)
        latest = self.checkpoints.latest()
        if latest is None:
            places = jax.tree.map(lambda leaf: leaf.sharding, target)
            make = functools.partial(new_state, *parts)
            return jax.jit(make, out_shardings=places)()
        state, data_state = self.checkpoints.restore(latest, target)
        self.batches.set_state(data_state)
        return state

    def describe(self) -> None:
        """Prints the sizes."""
        settings, text = self.settings, self.text
        count = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        tokens = settings.batch_size * settings.sequence_length
        self._say(
            f"{text.tokens:,} tokens of a vocabulary of {text.vocab_size:,}; "
            f"{len(text.train):,} rows to train on, {len(text.heldout):,} held out"
        )
        self._say(
            f"{count:,} parameters in {settings.dtype}; {tokens:,} tokens per step; "
            f"mesh {dict(self.mesh.shape)} of {jax.default_backend()} devices"
        )
        self._say(
            f"the learning rate falls until step {settings.schedule_steps:,}; training "
            f"ends at step {settings.steps:,}"
        )
        if self.start:
            self._say(f"going on from step {self.start}")

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def train(self) -> bool:
        """Runs the loop; returns False if somebody stopped it early.

        Raises:
          TrainingError: too many steps were skipped, or something could not be written;
            or data could not be read, and then everything was saved before.
        """
        settings = self.settings
        pending: Metrics | None = None
        recorder = Recorder(settings, self.start, self.console)
        with self.checkpoints, recorder, StopRequest() as stop:
            while self.step < settings.steps and not stop:
                batch = self.share.put(next(self.batches))
                stop.vote(failed=self.batches.failure is not None)
                self.state, metrics = self.train_step(self.state, batch)
                # The step before is dealt with while its successor is under way.
                recorder.settle(self.step, pending)
                self.checkpoints.finish()
                pending = metrics
                self.step += 1
                if self.step % settings.checkpoint_every == 0:
                    recorder.settle(self.step, pending)
                    pending = None
                    if not recorder.is_skipping:
                        self.save()
            recorder.settle(self.step, pending)
            self.save()
        is_done = self.step >= settings.steps
        if stop.has_failed and not is_done:
            self._say(f"everything was saved at step {self.step}")
            raise first_failure(self.batches.failure)
        return is_done

    def save(self) -> None:
        """Starts to write a checkpoint of everything that a step changes."""
        self.checkpoints.save(self.step, self.state, self.batches.get_state())

    def evaluate(self) -> None:
        """Adds the held-out metrics of this step, unless they are there already."""
        path, settings = self.settings.out / "heldout.jsonl", self.settings
        if from_first(lambda: int(self.step in steps_of(path))):
            return
        batches = self.text.heldout_batches(
            settings.batch_size, settings.eval_batches, self.share.places
        )
        record = evaluate(
            self.model,
            self.state.params,
            routing_bias(self.state.loss),
            map(self.share.put, batches),
            self.mesh,
        )
        if is_first():
            append_record(path, {"step": self.step} | record)

    def sample(self) -> str:
        """Returns the prompt and what the model makes of it."""
        settings, text = self.settings, self.text
        prompt = [text.eos, *text.tokenizer.encode(settings.prompt).ids]
        count = min(settings.sequence_length - len(prompt), settings.sample_tokens)
        if count < 1:
            return settings.prompt
        temperature = self.state.loss.temperature
        made = generate(
            self.model,
            self.state.params,
            routing_bias(self.state.loss),
            np.array([prompt], np.int32),
            np.array([len(prompt)], np.int32),
            jax.random.key(settings.seed),
            count=count,
            sampling=Sampling(
                temperature=1.0 if temperature is None else float(temperature),
                top_k=CANDIDATES,
            ),
        )
        return text.tokenizer.decode([*prompt[1:], *np.asarray(made)[0].tolist()])

    def report(self, *, is_done: bool) -> None:
        """Draws the curves, and prints the table, a sample and the paths."""
        out, console = self.settings.out, self.console
        records = read_records(out / "metrics.jsonl")
        heldout = read_records(out / "heldout.jsonl")
        if records and is_first():
            with writing(out / "losses.png"):
                plot_losses(records, heldout, out / "losses.png")
        if not is_done:
            self._say(
                f"stopped and saved at step {self.step}: the same command goes on there"
            )
            return
        if records:
            show_table(console, records, heldout)
            self._say(f"{records[-1]['seconds']:.0f} s of training")
            if skipped := records[-1]["skipped_steps"]:
                self._say(f"{skipped:.0f} steps were skipped: they were not finite")
        if self.settings.sample_tokens:
            # Every process takes part in the sample; the first one's console shows it.
            sample = Sample(self.step, self.settings.prompt, self.sample())
            console.rule("sample")
            console.print(sample.text, markup=False, highlight=False, soft_wrap=True)
            console.rule()
            if is_first():
                keep_sample(out / "samples.jsonl", sample)
        show_paths(console, out)


def main(arguments: Sequence[str], console: Console | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        settings, fields = parse_settings(arguments)
        # Fails on a wrong field now, not after the data have been read.
        size = settings.vocab_size
        loss = make_loss_config(settings, fields, size, size - 1)
        if settings.compile_for:
            compile_for(settings, loss, plan, console or Console())
            return 0
        if settings.deterministic:
            use_deterministic_operations()
        run = Run(settings, fields, console or Console(quiet=not is_first()))
        if run.step == 0:
            run.evaluate()
        is_done = run.train()
        if is_done:
            run.evaluate()
        run.report(is_done=is_done)
    except (TrainingError, ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(f"error: another process ended: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was saved before stays", file=sys.stderr)
        return 130
    return 0


def start() -> int:
    """Joins the other processes, if there are any, and runs the command line."""
    try:
        join_pod()
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return main(sys.argv[1:])


if __name__ == "__main__":
    run_to_the_end(start)

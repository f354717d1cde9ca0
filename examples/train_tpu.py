"""Trains a small language model on real text under the unified loss.

    python examples/train_tpu.py --preset demo
    python examples/train_tpu.py --help

It reads from top to bottom: the data, the loss, the model, the step, the loop. The same
file runs on a laptop's CPU, on GPUs and on a TPU pod, where it is started once a host.
Exit code 0: done, or stopped by Ctrl-C or SIGTERM with everything saved. 1: an error,
explained on stderr. 130: Ctrl-C outside of training, or a second one during it.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from checkpoint import Checkpoints
from corpus import load_corpus
from data import prepare_data
from devices import join_pod, make_mesh, put_batch, shardings_of
from errors import TrainingError
from evaluate import evaluate, generate, routing_bias
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int
from layers import Batch
from metrics import Metrics, MetricsLog, append_record, check, read_records
from model import LanguageModel, loss_inputs
from plot import plot_losses
from report import ProgressReport, show_paths, show_table
from rich.console import Console
from run_folder import open_run
from settings import LossFields, Settings, make_loss_config, parse_settings
from stopping import StopRequest

import ava_jax


class TrainState(NamedTuple):
    """Everything that a step changes."""

    step: Int[Array, ""]
    params: optax.Params
    optimizer: optax.OptState
    loss: ava_jax.LossState


# The vocabulary's columns come in multiples of this, as matrix units like them.
COLUMNS = 128

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def make_optimizer(
    settings: Settings,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW behind a clipped gradient; a warm-up, then a cosine down to a tenth."""
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


def make_train_step(
    settings: Settings, model: LanguageModel, loss_fn: ava_jax.UnifiedLoss, mesh: Mesh
) -> TrainStep:
    """One optimizer step over all micro-batches: a single jitted, donated function."""
    optimizer, schedule = make_optimizer(settings)
    parts = settings.microbatches
    rows_over_data = NamedSharding(mesh, P(None, "data"))

    def micro_loss(
        params: optax.Params,
        state: ava_jax.LossState,
        micro: Batch,
        normalizers: ava_jax.Normalizers,
    ) -> tuple[Array, ava_jax.StepStats]:
        inputs = loss_inputs(model, params, micro, routing_bias(state))
        loss, _, stats = loss_fn.accumulate(state, normalizers=normalizers, **inputs)
        return loss, stats

    def split(array: Array) -> Array:
        window = array.reshape(parts, -1, array.shape[-1])
        return jax.lax.with_sharding_constraint(window, rows_over_data)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        window = Batch(*map(split, batch))
        normalizers = loss_fn.normalizers(
            targets=window.targets,
            attention_mask=window.segment_ids > 0,
            segment_ids=window.segment_ids,
        )

        def add(
            grads: optax.Params, micro: Batch
        ) -> tuple[optax.Params, ava_jax.StepStats]:
            gradient = jax.grad(micro_loss, has_aux=True)
            more, stats = gradient(state.params, state.loss, micro, normalizers)
            return jax.tree.map(jnp.add, grads, more), stats

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        grads, stats = jax.lax.scan(add, zeros, window)
        stats = jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), stats)

        updates, optimizer_state = optimizer.update(
            grads, state.optimizer, state.params
        )
        after = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
            loss=loss_fn.commit(state.loss, stats),
        )
        metrics = loss_fn.summary(after.loss, stats) | {
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
        }
        return after, Metrics.pack(metrics)

    shapes = jax.eval_shape(functools.partial(new_state, settings, model, loss_fn))
    placed = shardings_of(shapes, mesh)
    return jax.jit(
        train_step, donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, P()))
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
    )


class Run:
    """One call of the trainer: everything built, restored if the folder has a run."""

    def __init__(
        self, settings: Settings, fields: LossFields, console: Console
    ) -> None:
        corpus = load_corpus(settings.data)
        console.print(corpus.describe(), highlight=False, soft_wrap=True)
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
        self.is_first_host = jax.process_index() == 0
        if self.is_first_host:
            text.tokenizer.save(str(settings.out / "tokenizer.json"))
        self.mesh = make_mesh(
            settings.mesh, settings.batch_size // settings.microbatches
        )
        self.model = LanguageModel(
            config=settings.model,
            loss=loss,
            columns=-(-text.vocab_size // COLUMNS) * COLUMNS,
            dtype=jnp.dtype(settings.dtype),
            fused=settings.fused,
        )
        self.loss_fn = ava_jax.unified_loss(loss)
        self.train_step = make_train_step(settings, self.model, self.loss_fn, self.mesh)
        self.checkpoints = Checkpoints(settings.out / "checkpoints", settings.keep)
        self.batches = text.batches(settings.batch_size, settings.seed)
        self.state = self._begin()
        self.start = self.step = int(self.state.step)
        self.describe()

    def _begin(self) -> TrainState:
        """The state of the newest checkpoint, or a new one."""
        make = functools.partial(new_state, self.settings, self.model, self.loss_fn)
        shapes = jax.eval_shape(make)
        placed = shardings_of(shapes, self.mesh)
        latest = self.checkpoints.latest()
        if latest is None:
            return jax.jit(make, out_shardings=placed)()
        target = jax.tree.map(
            lambda leaf, sharding: leaf.update(sharding=sharding), shapes, placed
        )
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
        """Runs the loop; returns False if somebody stopped it early."""
        settings = self.settings
        tokens = settings.batch_size * settings.sequence_length
        log = MetricsLog(settings.out, self.start, self.is_first_host)
        pending: Metrics | None = None

        def settle() -> None:
            """Deals with the last step while its successor is under way."""
            if pending is None:
                return
            self.checkpoints.finish()
            record = pending.fetch()
            check(self.step, record)
            if self.step % settings.log_every == 0 or self.step == settings.steps:
                log.write(self.step, self.step * tokens, record)
            progress.show(self.step, log.seconds(), record)

        report = ProgressReport(self.console, self.start, settings.steps, tokens)
        try:
            with StopRequest() as stop, report as progress:
                while self.step < settings.steps and not stop:
                    batch = put_batch(next(self.batches), self.mesh)
                    self.state, metrics = self.train_step(self.state, batch)
                    settle()
                    pending = metrics
                    self.step += 1
                    if self.step % settings.checkpoint_every == 0:
                        check(self.step, pending.fetch())
                        self.save()
                settle()
                self.save()
        finally:
            self.checkpoints.finish()
            log.close()
        return self.step >= settings.steps

    def save(self) -> None:
        """Starts to write a checkpoint of everything that a step changes."""
        self.checkpoints.save(self.step, self.state, self.batches.get_state())

    def evaluate(self) -> None:
        """Appends the held-out metrics of this step, unless they are there already."""
        path = self.settings.out / "heldout.jsonl"
        if any(record["step"] == self.step for record in read_records(path)):
            return
        settings = self.settings
        batches = self.text.heldout_batches(settings.batch_size, settings.eval_batches)
        record = evaluate(
            self.model,
            self.state.params,
            routing_bias(self.state.loss),
            (put_batch(batch, self.mesh) for batch in batches),
        )
        if self.is_first_host:
            append_record(path, {"step": self.step} | record)

    def sample(self) -> str:
        """Returns the prompt and what the model makes of it."""
        settings, text = self.settings, self.text
        prompt = [text.eos, *text.tokenizer.encode(settings.prompt).ids]
        length = min(len(prompt) + settings.sample_tokens, settings.sequence_length)
        row = np.full(length, text.eos, np.int32)
        row[: len(prompt)] = prompt
        filled = generate(
            self.model,
            self.state.params,
            self.state.loss,
            jnp.asarray(row),
            jax.random.key(settings.seed),
            prompt_length=len(prompt),
        )
        return text.tokenizer.decode(np.asarray(filled)[1:].tolist())

    def report(self, *, is_done: bool) -> None:
        """Draws the curves, and prints the table, a sample and the paths."""
        out, console = self.settings.out, self.console
        records = read_records(out / "metrics.jsonl")
        heldout = read_records(out / "heldout.jsonl")
        if records:
            plot_losses(records, heldout, out / "losses.png")
        if not is_done:
            self._say(
                f"stopped and saved at step {self.step}: the same command goes on there"
            )
            return
        if records:
            show_table(console, records, heldout)
            self._say(f"{records[-1]['seconds']:.0f} s of training")
        if self.settings.sample_tokens:
            console.rule("sample")
            console.print(self.sample(), markup=False, highlight=False, soft_wrap=True)
            console.rule()
        show_paths(console, out)


def main(arguments: Sequence[str], console: Console | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        settings, fields = parse_settings(arguments)
        # Fails on a wrong field now, not after the data have been read.
        make_loss_config(settings, fields, settings.vocab_size, settings.vocab_size - 1)
        run = Run(settings, fields, console or Console(quiet=jax.process_index() != 0))
        run.evaluate()
        is_done = run.train()
        if is_done:
            run.evaluate()
        if run.is_first_host:
            run.report(is_done=is_done)
    except (TrainingError, ValueError, TypeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what was saved before stays", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    join_pod()
    sys.exit(main(sys.argv[1:]))

"""Trains a small language model on real text under the unified loss.

    python examples/train_tpu.py --preset demo
    python examples/train_tpu.py --help

It reads from top to bottom: the step, the run, the loop. The same file runs on a
laptop's CPU, on GPUs and on a TPU pod, where it is started once per host;
`python -m trainer.run.launch_local` starts several processes on one machine. Exit code
0: done, or stopped by Ctrl-C, SIGTERM or SIGHUP with everything saved. 1: an error,
explained on stderr. 130: Ctrl-C outside of training, or a second one during it.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int
from rich.console import Console

import ava_jax
from trainer.data.corpus import load_corpus
from trainer.data.text import prepare_data
from trainer.errors import TrainingError
from trainer.files import write_whole
from trainer.model.expert_load import count_choices, relative_load
from trainer.model.language_model import LanguageModel, loss_inputs
from trainer.model.layers import Batch
from trainer.report.finish import finish
from trainer.report.metrics import Metrics, append_record, steps_of
from trainer.report.recorder import Recorder
from trainer.report.summary import say, show_run
from trainer.run.checkpoint import Checkpoints
from trainer.run.compile_for import compile_for
from trainer.run.devices import (
    RowShare,
    loss_on,
    make_mesh,
    split_rows,
    use_deterministic_operations,
)
from trainer.run.evaluate import evaluate, routing_bias
from trainer.run.folder import only_trainer, open_run, refuse_other_data
from trainer.run.guard import choose, is_finite
from trainer.run.optimizer import make_optimizer
from trainer.run.processes import (
    first_failure,
    from_first,
    is_first,
    run_to_the_end,
)
from trainer.run.settings import LossFields, Settings, make_loss_config, parse_settings
from trainer.run.state import TrainState, init_sharded, make_model, state_shapes
from trainer.run.stopping import StopRequest


class StepSums(NamedTuple):
    """What the micro-batches of a step add up to, besides the gradient."""

    stats: ava_jax.StepStats
    choices: Int[Array, "L E"] | None


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
Gradient = Callable[[TrainState, Batch], tuple[optax.Params, StepSums]]


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
            loss, _, stats = loss_fn.accumulate(
                state, normalizers=given, **loss_fn.select(inputs)
            )
        return loss, StepSums(stats, count_choices(inputs, model.config.experts))

    def gradient(state: TrainState, batch: Batch) -> tuple[optax.Params, StepSums]:
        window = split_rows(batch, settings.microbatches, mesh)
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


class Run:
    """One call of the trainer: everything built, restored if the folder has a run."""

    def __init__(
        self, settings: Settings, fields: LossFields, console: Console
    ) -> None:
        corpus = load_corpus(settings.data)
        say(console, corpus.describe())
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
            settings.batch_size, settings.seed, self.share.row_ids
        )
        self.state = self._begin()
        self.start = self.step = int(self.state.step)
        show_run(console, settings, text, self.state, self.mesh)

    def _begin(self) -> TrainState:
        """Returns the state of the newest checkpoint, or a new one."""
        parts = self.settings, self.model, self.loss_fn, self.mesh
        latest = self.checkpoints.latest()
        if latest is None:
            return init_sharded(*parts)
        state, data_state = self.checkpoints.restore(latest, state_shapes(*parts))
        self.batches.set_state(data_state)
        return state

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
            say(self.console, f"everything was saved at step {self.step}")
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
            settings.batch_size, settings.eval_batches, self.share.row_ids
        )
        record = evaluate(
            self.model,
            self.state.params,
            self.state.loss,
            map(self.share.put, batches),
            self.mesh,
        )
        if is_first():
            append_record(path, {"step": self.step} | record)


def main(arguments: Sequence[str], console: Console | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        settings, fields = parse_settings(arguments)
        # Fails on a wrong field now, not after the data have been read.
        size = settings.vocab_size
        loss = make_loss_config(settings, fields, size, size - 1)
        if settings.compile_for:
            compile_for(settings, loss, make_train_step, console or Console())
            return 0
        if settings.deterministic:
            use_deterministic_operations()
        with only_trainer(settings.out):
            run = Run(settings, fields, console or Console(quiet=not is_first()))
            if run.step == 0:
                run.evaluate()
            is_done = run.train()
            if is_done:
                run.evaluate()
            finish(run.settings, run.model, run.state, run.text, run.console)
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


if __name__ == "__main__":
    run_to_the_end(main)

"""Distillation of a trained model into a smaller one, against training without it.

    make demo
    python examples/distill.py --checkpoint runs/demo

A run on text of its own takes `--data` here, too: its record alone does not decide what
is read.

A student of half the width starts twice from the same parameters and sees the same
batches: once under cross-entropy alone, once under cross-entropy and the divergence
from the teacher's distribution at a temperature. That comes from the hidden states and
the `lm_head` of both, so that neither has logits. On the demo's data, after 400 steps,
held-out perplexity is 63.6 with the teacher and 75.8 without (seed 1: 65.0 and 78.6);
the teacher's is 46.4. Both together take 140 seconds of CPU time.
"""

import argparse
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import ava_jax
from trainer.data.text import Rows
from trainer.model.language_model import LanguageModel, hidden_and_head
from trainer.model.layers import Batch
from trainer.recipe import plot_curves, run_recipe, write_records
from trainer.report.metrics import Record
from trainer.run.evaluate import plain_loss
from trainer.run.optimizer import make_optimizer
from trainer.run.settings import Settings
from trainer.run.state import make_model
from trainer.run.trained import Trained, load_text

STEPS, EVALUATIONS = 400, 8
TEMPERATURE = 2.0
WEIGHT = 0.5  # of the divergence; the rest is that of the cross-entropy

State = tuple[optax.Params, optax.OptState]
Step = Callable[[State, optax.Params, Batch], State]


def half_of(settings: Settings, steps: int) -> Settings:
    """Returns the settings of a model of half the width that takes some steps."""
    size = settings.model
    half = dataclasses.replace(
        size, width=size.width // 2, inner_width=size.inner_width // 2
    )
    return dataclasses.replace(
        settings, model=half, schedule_steps=steps, warmup_steps=steps // 8
    )


def cross_entropy(
    model: LanguageModel, batch: Batch, hidden: Array, head: Array
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes the mean cross-entropy of a batch."""
    loss_fn = ava_jax.unified_loss(plain_loss(model.loss))
    loss, aux, _ = loss_fn(
        loss_fn.init(),
        targets=batch.targets,
        attention_mask=batch.segment_ids > 0,
        hidden_states=hidden,
        lm_head=head,
    )
    return loss, aux


def make_step(
    student: LanguageModel,
    teacher: Trained,
    optimizer: optax.GradientTransformation,
    weight: float,
) -> Step:
    """Returns a compiled step of training; with `weight` 0 there is no teacher."""

    def objective(
        params: optax.Params, teacher_params: optax.Params, batch: Batch
    ) -> Float[Array, ""]:
        hidden, head = hidden_and_head(student, params, batch, None)
        loss, _ = cross_entropy(student, batch, hidden, head)
        if not weight:
            return loss
        teacher_hidden, teacher_head = hidden_and_head(
            teacher.model, teacher_params, batch, teacher.bias
        )
        distilled, _ = ava_jax.distillation_loss(
            hidden_states=hidden,
            lm_head=head,
            teacher_hidden_states=teacher_hidden,
            teacher_lm_head=teacher_head,
            attention_mask=batch.segment_ids > 0,
            temperature=TEMPERATURE,
            vocab_size=student.loss.vocab_size,
            logit_soft_cap=student.loss.logit_soft_cap,
            teacher_logit_soft_cap=teacher.model.loss.logit_soft_cap,
        )
        return (1 - weight) * loss + weight * distilled

    def step(state: State, teacher_params: optax.Params, batch: Batch) -> State:
        params, moments = state
        grads = jax.grad(objective)(params, teacher_params, batch)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments

    return jax.jit(step)


@functools.partial(jax.jit, static_argnames="model")
def sums(
    model: LanguageModel, params: optax.Params, batch: Batch, bias: Array | None
) -> Float[Array, "2"]:
    """Computes the sum of the cross-entropy of a batch, and the number of tokens."""
    inputs = hidden_and_head(model, params, batch, bias)
    loss, aux = cross_entropy(model, batch, *inputs)
    count = aux["num_tokens"].astype(jnp.float32)
    return jnp.stack([loss * count, count])


def perplexity(
    model: LanguageModel,
    params: optax.Params,
    heldout: Iterable[Batch],
    bias: Array | None = None,
) -> float:
    """Returns the perplexity of held-out batches."""
    found = [np.asarray(sums(model, params, batch, bias)) for batch in heldout]
    nll, count = np.stack(found).sum(axis=0).tolist()
    return math.exp(nll / count)


def train(teacher: Trained, options: argparse.Namespace) -> list[Record]:
    """Trains both students; writes their held-out perplexities and a plot."""
    settings = half_of(teacher.settings, options.steps)
    text = load_text(
        options.checkpoint, settings, data=options.data, cache=options.cache
    )
    student = make_model(settings, plain_loss(teacher.model.loss))
    optimizer, _ = make_optimizer(settings)
    rows = settings.batch_size
    heldout = [*map(put, text.heldout_batches(rows, settings.eval_batches))]
    init = jax.jit(student.init)
    params = init(jax.random.key(options.seed), heldout[0])["params"]
    weights = {"plain": 0.0, "distilled": WEIGHT}
    # Committed to the device, as what a step returns: so it is compiled once.
    begin: State = jax.device_put((params, optimizer.init(params)), jax.devices()[0])
    states: dict[str, State] = dict.fromkeys(weights, begin)
    steps = {
        name: make_step(student, teacher, optimizer, weight)
        for name, weight in weights.items()
    }
    goal = perplexity(teacher.model, teacher.params, heldout, teacher.bias)
    batches, begun = text.batches(rows, options.seed), time.perf_counter()
    records: list[Record] = []
    for number in range(1, options.steps + 1):
        batch = put(next(batches))
        for name, step in steps.items():
            states[name] = step(states[name], teacher.params, batch)
        if number % max(1, options.steps // EVALUATIONS) and number < options.steps:
            continue
        record = {"step": number, "seconds": time.perf_counter() - begun}
        for name, (params, _) in states.items():
            record[name] = perplexity(student, params, heldout)
        records.append(record | {"teacher": goal})
        print(
            "step {step}: held-out perplexity {plain:.1f} plain, {distilled:.1f} "
            "distilled, {teacher:.1f} of the teacher".format(**records[-1])
        )
    write_records(options.out / "distill.jsonl", records)
    panels = {"Held-out perplexity": ("plain", "distilled", "teacher")}
    plot_curves(options.out / "distill.png", records, panels)
    return records


def put(rows: Rows) -> Batch:
    """Returns a batch on the device."""
    return Batch(*map(jnp.asarray, rows))


if __name__ == "__main__":
    sys.exit(
        run_recipe(
            train,
            sys.argv[1:],
            name="distill",
            doc=__doc__,
            steps=STEPS,
            reads_text=True,
        )
    )

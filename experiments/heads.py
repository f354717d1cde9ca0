"""What multi-token prediction heads do to the main head, and save in decoding.

Decoding is timed one prompt at a time, plain and self-speculative in turns.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from ava_jax import metrics
from experiments.additions import GateCalibration, first_drafts
from experiments.lab import (
    Numbers,
    Trained,
    add_up,
    evaluate,
    heldout_batches,
    heldout_prompts,
    load_text,
    train,
)
from experiments.plots import plot_calibration, plot_dots
from experiments.records import Results, RunRecord, picture
from experiments.sizes import CPU, GPU, Sizes
from experiments.variants import Variant
from trainer.decode.decoder import generate
from trainer.decode.speculate import Speculated, speculate
from trainer.model.language_model import (
    LanguageModel,
    is_adaptive,
    loss_inputs,
    with_params,
)
from trainer.model.layers import Batch

SIZES = {
    "cpu": dataclasses.replace(CPU, steps=800, prompts=200),
    "gpu": dataclasses.replace(GPU, prompts=200),
}
AHEAD: dict[str, object] = {"use_mtp": True, "num_future_tokens": 3}
ADAPTIVE = AHEAD | {"mtp_type": "adaptive", "mtp_weight": 0.3}
VARIANTS = {
    "none": Variant(),
    "parallel": Variant(AHEAD | {"mtp_weight": 0.3}),
    "sequential": Variant(AHEAD | {"mtp_type": "sequential", "mtp_weight": 0.3}),
    "adaptive": Variant(ADAPTIVE),
    "adaptive, no gradient": Variant(ADAPTIVE | {"stop_confidence_gradient": True}),
    "adaptive, taught gate": Variant(
        # Nothing but the truth about the drafts moves this gate.
        ADAPTIVE | {"use_confidence_weighting": False, "confidence_reg_strength": 0.0},
        (GateCalibration(weight=0.1),),
        confidence_threshold=0.0,
    ),
}
# The confidence from which drafts are made.
DRAFTING = 0.5
# Prompts that decoding is timed on, one at a time.
TIMED = 20


def measure(sizes: Sizes, variant: Variant, seed: int) -> RunRecord:
    """Trains a variant; measures its heads, and decoding with them."""
    text = load_text(sizes)
    trained = train(sizes, variant, seed, text)
    numbers = evaluate(sizes, trained, text)
    numbers["step_milliseconds"] = trained.step_milliseconds
    extra: dict[str, object] = {}
    if variant.fields:
        prompts = heldout_prompts(sizes, text).prompts
        numbers |= decoding(sizes, trained, prompts)
    if is_adaptive(trained.model.loss):
        batches = heldout_batches(sizes, text)
        bins = add_up(gate_bins(trained.model, trained.params, b) for b in batches)
        numbers["gate_error"] = float(metrics.expected_calibration_error(bins))
        extra["gate"] = {k: np.asarray(v).tolist() for k, v in vars(bins).items()}
    paths = {k: v for k, v in trained.paths.items() if k in ("step", "nll")}
    return {
        "variant": "",
        "seed": seed,
        "numbers": numbers,
        "paths": paths,
        "extra": extra,
    }


def decoding(sizes: Sizes, trained: Trained, prompts: Int[Array, "N P"]) -> Numbers:
    """Returns the yield and the speed of speculation against plain decoding."""
    model = trained.model.clone(confidence_threshold=DRAFTING)
    params, bias = trained.params, trained.bias
    count = sizes.continuation

    def plain(rows: Int[Array, "n P"]) -> Int[Array, "n C"]:
        lengths = jnp.full(len(rows), rows.shape[1], jnp.int32)
        key = jax.random.key(0)
        return generate(model, params, bias, rows, lengths, key, count=count)

    def drafted(rows: Int[Array, "n P"]) -> Speculated:
        lengths = jnp.full(len(rows), rows.shape[1], jnp.int32)
        return speculate(model, params, bias, rows, lengths, count=count)

    expected, found = plain(prompts), drafted(prompts)
    same = jnp.mean(jnp.all(found.tokens == expected, axis=1).astype(jnp.float32))
    record = jax.tree.map(np.asarray, found.record)
    checked = record.drafted > 0
    depths = range(model.loss.num_future_tokens + 1)
    reached = [np.sum(checked & (record.accepted >= j)) for j in depths]
    rates = {
        f"acceptance_{j}": float(reached[j] / max(reached[j - 1], 1))
        for j in depths[1:]
    }
    calls = float(jnp.sum(found.calls))
    return rates | {
        "identical": float(same),
        # The first token comes with the prompt, which both ways read alike.
        "tokens_per_call": len(prompts) * (count - 1) / calls,
        "drafting_calls": float(np.sum(checked)) / calls,
        "speed_up": speed_up(plain, lambda rows: drafted(rows).tokens, prompts[:TIMED]),
    }


def speed_up(
    plain: Callable[[Array], Array],
    drafted: Callable[[Array], Array],
    prompts: Int[Array, "n P"],
) -> float:
    """Returns the median of the ratio of times, taken in turns."""
    ratios = []
    for number, prompt in enumerate(prompts):
        ways = (plain, drafted) if number % 2 else (drafted, plain)
        seconds = {way: _seconds(way, prompt[None]) for way in ways}
        # The first round compiles.
        if number:
            ratios.append(seconds[plain] / seconds[drafted])
    return statistics.median(ratios)


def _seconds(way: Callable[[Array], Array], rows: Int[Array, "1 P"]) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(way(rows))
    return time.perf_counter() - begun


@functools.partial(jax.jit, static_argnames="model")
def gate_bins(
    model: LanguageModel, params: optax.Params, batch: Batch
) -> metrics.CalibrationBins:
    """Bins the gate's confidences by whether the main head accepts the first draft."""
    inputs = loss_inputs(model, params, batch, None)
    hidden, confidence = inputs.get("hidden_states"), inputs.get("confidence_scores")
    logits = inputs.get("logits")
    if hidden is None or confidence is None or logits is None:
        raise ValueError("only adaptive heads have a gate")
    rows = hidden.reshape(-1, hidden.shape[-1])
    ahead = cast(
        Array,
        model.apply(with_params(params), rows, method=LanguageModel.parallel_logits),
    )
    real = model.loss.vocab_size
    first = ahead[0].reshape(logits.shape)[..., :real]
    accepted, unmasked = first_drafts(first, logits[..., :real], batch.segment_ids)
    return metrics.calibration_bins(
        confidence[:, :-1, 0], accepted, unmasked, num_bins=20
    )


def plot(results: Results) -> None:
    """Draws what the heads do, and how well the gate knows."""
    panels = {
        "nll": "held-out nll",
        "tokens_per_call": "tokens per model call",
        "speed_up": "speed-up of decoding",
    }
    goals = {"tokens_per_call": {"goal": 1.6}, "speed_up": {"goal": 1.3}}
    plot_dots(results, panels, picture(results), goals)
    plot_calibration(results, "gate", picture(results, "gate"))

"""Every term alone, and all together without each: what it does, and what it costs."""

import dataclasses

import ava_jax
from experiments import repetition
from experiments.additions import LearnedWeights
from experiments.plots import plot_dots, plot_paths
from experiments.records import Results, RunRecord, only, picture
from experiments.sizes import Sizes
from experiments.variants import PLAIN as PLAIN_FIELDS
from experiments.variants import Variant

SIZES = {
    "cpu": dataclasses.replace(repetition.SIZES["cpu"], steps=400),
    "gpu": repetition.SIZES["gpu"],
}

TERMS: dict[str, dict[str, object]] = {
    "label smoothing": {"label_smoothing": 0.1},
    "adaptive temperature": {
        "primary_loss_type": "deepseek",
        "adaptive_temperature": True,
    },
    "z-loss": {"z_loss_weight": 1e-4},
    "parallel heads": {"use_mtp": True, "num_future_tokens": 2, "mtp_weight": 0.1},
    "n-gram": {"use_ngram_penalty": True},
    "immediate repetition": {"use_immediate_repetition_penalty": True},
    "token unlikelihood": {"unlikelihood_weight": 1.0},
    "early EOS": {"eos_penalty_weight": 0.05},
    "contrastive": {"use_contrastive_loss": True, "contrastive_type": "simctg"},
}
# These replace another part of the loss, so they are not among "all".
ALTERNATIVES: dict[str, Variant] = {
    "focal": Variant({"use_focal_loss": True}),
    "sequential heads": Variant(
        TERMS["parallel heads"] | {"mtp_type": "sequential"},
    ),
    "parallel heads, learned weights": Variant(
        TERMS["parallel heads"],
        (LearnedWeights(terms=("main_loss", "mtp_loss")),),
    ),
    "contrastive token": Variant(
        {"contrastive_token_weight": 0.1, "contrastive_token_window": 60}
    ),
    "temperature 0.5": Variant(
        {
            "primary_loss_type": "deepseek",
            "adaptive_temperature": False,
            "initial_temperature": 0.5,
        }
    ),
    "smoothing and temperature": Variant(
        TERMS["label smoothing"] | TERMS["adaptive temperature"]
    ),
    # What `UnifiedLossConfig` has where nothing is set.
    "defaults": Variant(
        {
            field.name: field.default
            for field in dataclasses.fields(ava_jax.UnifiedLossConfig)
            if field.name in PLAIN_FIELDS
        }
    ),
}


def _joined(without: str | None = None) -> Variant:
    fields: dict[str, object] = {}
    for name, term in TERMS.items():
        if name != without:
            fields |= term
    return Variant(fields)


PLAIN = {"plain": Variant()}
ALONE = {name: Variant(fields) for name, fields in TERMS.items()} | ALTERNATIVES
TOGETHER = {"all": _joined()} | {f"all but {name}": _joined(name) for name in TERMS}
VARIANTS = PLAIN | ALONE | TOGETHER


def measure(sizes: Sizes, variant: Variant, seed: int) -> RunRecord:
    """Trains a variant; measures likelihood, calibration and repetition."""
    return repetition.measure(sizes, variant, seed)


def plot(results: Results) -> None:
    """Draws the figures of every variant, and what is learned or adapted on the way."""
    panels = {
        "tempered_perplexity": "held-out perplexity",
        "tempered_calibration_error": "calibration error",
        "repeated_4grams": "repeated 4-grams",
        "step_milliseconds": "ms per step",
    }
    for variants, of in ((PLAIN | ALONE, ""), (PLAIN | TOGETHER, "all")):
        shown = only(results, variants)
        if shown["runs"]:
            plot_dots(shown, panels, picture(results, of))
    moving = ["adaptive temperature", "all", "all but label smoothing"]
    learning = ["parallel heads, learned weights"]
    paths = {
        "temperature": "adaptive temperature",
        "learned_weights": "learned weights: main loss [1], heads [2]",
    }
    shown = only(results, moving + learning)
    plot_paths(shown, paths, picture(results, "paths"))

"""Hypothesis strategies for one call of the unified loss.

Hypothesis draws the seed and every choice is made from it, because a few dozen
examples of freely drawn choices are mostly the smallest ones. Shapes come from a short
list, because each new one has to be compiled.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import optax
from hypothesis import strategies as st
from numpy.random import Generator, default_rng

from support.oracle_inputs import read_tokens, resolve
from support.oracle_terms import shifted_weights

# (B, S, V)
SHAPES = ((1, 1, 2), (2, 3, 5), (3, 12, 17), (1, 40, 6), (3, 12, 17), (2, 9, 300))
SMALL_SHAPES = SHAPES[:4]
SEEDS = st.integers(0, 2**32 - 1)
WIDTH = 6
EXPERTS = 4


@dataclass(frozen=True)
class Scenario:
    """A config and one call's inputs as NumPy arrays."""

    config: dict[str, Any]
    inputs: dict[str, Any]
    train: bool = True


# Drawing ------------------------------------------------------------------------


def pick(rng: Generator, options: Sequence[Any]) -> Any:
    """One of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def draw_targets(rng: Generator, shape: tuple[int, ...], vocab: int) -> Any:
    """Ids from a few classes, so that n-grams and runs repeat."""
    few = rng.choice(vocab, size=2)
    repeated = rng.choice(few, size=shape)
    return np.where(
        rng.random(shape) < 0.8, repeated, rng.integers(0, vocab, shape)
    ).astype(np.int32)


def draw_mask(rng: Generator, kind: str, shape: tuple[int, ...]) -> Any:
    """None, or a mask with holes: bool, int or float, or all zero."""
    kept = rng.random(shape) < 0.75
    masks = {
        "none": None,
        "bool": kept,
        "int": kept.astype(np.int32),
        "float": (kept * rng.integers(1, 9, shape) / 4).astype(np.float32),
        "empty": np.zeros(shape, np.int32),
        "bad": np.where(
            kept, 1, rng.choice([-1e9, -1.0, np.nan, np.inf], size=shape)
        ).astype(np.float32),
    }
    return masks[kind]


def draw_segments(rng: Generator, shape: tuple[int, ...]) -> Any:
    """Packed rows, some with padding at the end."""
    starts = rng.random(shape) < 0.25
    segments = 1 + np.cumsum(starts, axis=1)
    tail = rng.integers(0, shape[1] // 3 + 1, shape[0])
    for row, count in zip(segments, tail, strict=True):
        row[shape[1] - count :] = 0
    return segments.astype(np.int32)


def spoil_targets(rng: Generator, targets: Any, ignore_index: int) -> Any:
    """Some ids outside the vocabulary, and some to ignore."""
    bad = rng.choice([-1, 10**6, ignore_index, ignore_index], size=targets.shape)
    return np.where(rng.random(targets.shape) < 0.2, bad, targets).astype(np.int32)


def draw_logits(rng: Generator, shape: tuple[int, ...], scale: float) -> Any:
    """Normal logits that float32 and the oracle hold alike."""
    return (scale * rng.standard_normal(shape)).astype(np.float32)


def forbid_classes(rng: Generator, logits: Any, targets: Any, vocab: int) -> Any:
    """−inf in places that leave each token its target and another class."""
    forbidden = rng.random(logits.shape) < 0.2
    safe = np.clip(targets, 0, vocab - 1)[..., None]
    np.put_along_axis(forbidden, safe, False, axis=-1)
    np.put_along_axis(forbidden, (safe + 1) % vocab, False, axis=-1)
    return np.where(forbidden, np.float32(-np.inf), logits)


TOKEN_OPTIONS: dict[str, list[Any]] = {
    "primary_loss_type": ["deepseek", "deepseek", "standard", "adaptive_mtp"],
    "initial_temperature": [1.0, 1.3],
    "label_smoothing": [0.0, 0.1],
    "penalty_source": ["predictions", "predictions", "targets"],
    "use_ngram_penalty": [True, False],
    "ngram_size": [1, 2, 3, 4],
    "ngram_max_matches": [1, 2, 8],
    "use_immediate_repetition_penalty": [True, False],
    "immediate_repetition_weight": [0.5, optax.linear_schedule(0.25, 1.0, 4)],
    "unlikelihood_weight": [0.0, 0.3],
    "z_loss_weight": [0.0, 0.01],
    "eos_token_id": [None, 1, 1],
    "pad_token_id": [None, 0, 1],
    "min_sequence_length": [2, 20],
    "eos_penalty_weight": [0.7],
    "ignore_index": [-100, 0],
    "logit_soft_cap": [None, None, 5.0],
    "use_focal_loss": [False, False, True],
    "focal_alpha": [0.5, "per class"],
    "focal_gamma": [0.0, 0.5, 2.0],
    "contrastive_token_weight": [0.0, 0.25, optax.linear_schedule(0.25, 1.0, 4)],
    "contrastive_token_window": [1, 3, 60],
}


def token_scenario(rng: Generator, path: str) -> Scenario:
    """Everything that one vocabulary pass serves, through the given path."""
    rows, length, vocab = pick(rng, SHAPES)
    config = {
        "vocab_size": vocab,
        **{name: pick(rng, values) for name, values in TOKEN_OPTIONS.items()},
    }
    if config["focal_alpha"] == "per class":
        config["focal_alpha"] = tuple(rng.random(vocab).tolist())
    targets = draw_targets(rng, (rows, length), vocab)
    if pick(rng, [True, False]):
        targets = spoil_targets(rng, targets, config["ignore_index"])
    kinds = ["none", "bool", "int", "float", "float", "empty", "bad"]
    inputs: dict[str, Any] = {"targets": targets}
    mask = draw_mask(rng, pick(rng, kinds), targets.shape)
    if mask is not None:
        inputs["attention_mask"] = mask
    if pick(rng, [True, False]):
        inputs["segment_ids"] = draw_segments(rng, targets.shape)
        config["mask_boundaries"] = pick(rng, [True, False])
    extra = pick(rng, [0, 0, 3])
    scale = pick(rng, [1.0, 6.0])
    if path == "logits":
        allow_inf = pick(rng, [True, False])
        inputs["logits"] = path_logits(rng, config, inputs, extra, scale, allow_inf)
    else:
        inputs |= fused_inputs(rng, config, inputs, extra, scale)
        if pick(rng, [True, False]):
            del inputs["lm_head_bias"]
        config["chunk_size"] = pick(rng, [None, 1, 4, 64])
    if pick(rng, [False, False, True]):
        inputs = rounded_to_bfloat16(inputs)
    return Scenario(config, inputs, train=pick(rng, [True, True, False]))


def counted_places(config: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """[B, S]: which positions the oracle counts."""
    cfg = resolve(config, 0)
    shape = (*inputs["targets"].shape, cfg.vocab_size)
    return read_tokens(cfg, {**inputs, "logits": np.zeros(shape)}).weights != 0


def routed_places(config: dict[str, Any], inputs: dict[str, Any]) -> Any:
    """[B, S]: which positions the oracle's routers see."""
    cfg, shape = resolve(config, 0), inputs["targets"].shape
    logits = np.zeros((*shape, cfg.vocab_size))
    routed = np.zeros(inputs["targets"].size, bool)
    routed[read_tokens(cfg, {**inputs, "logits": logits}).routed] = True
    return routed.reshape(shape)


def poison(rng: Generator, values: Any, keep: Any) -> Any:
    """NaN and ±inf wherever nothing counts."""
    junk = rng.choice(np.array([np.nan, np.inf, -np.inf]), size=values.shape)
    return np.where(keep[..., None], values, junk).astype(np.float32)


def path_logits(
    rng: Generator,
    config: dict[str, Any],
    inputs: dict[str, Any],
    extra: int,
    scale: float,
    allow_inf: bool,
) -> Any:
    """Logits with padded columns, masked junk and perhaps −inf entries."""
    vocab, targets = config["vocab_size"], inputs["targets"]
    logits = draw_logits(rng, (*targets.shape, vocab + extra), scale)
    logits[..., vocab:] = pick(rng, [1e4, np.nan])
    if allow_inf and vocab > 2:
        part = forbid_classes(rng, logits[..., :vocab], targets, vocab)
        logits = np.concatenate([part, logits[..., vocab:]], axis=-1)
    return poison(rng, logits, counted_places(config, inputs))


def fused_inputs(
    rng: Generator,
    config: dict[str, Any],
    inputs: dict[str, Any],
    extra: int,
    scale: float,
) -> dict[str, Any]:
    """Hidden states, a head with padded columns, and its bias."""
    vocab = config["vocab_size"]
    hidden = draw_logits(rng, (*inputs["targets"].shape, WIDTH), 1.0)
    head = draw_logits(rng, (WIDTH, vocab + extra), scale / 2)
    head[:, vocab:] = 1e4
    return {
        "hidden_states": poison(rng, hidden, counted_places(config, inputs)),
        "lm_head": head,
        "lm_head_bias": draw_logits(rng, (vocab + extra,), 0.5),
    }


def rounded_to_bfloat16(inputs: dict[str, Any]) -> dict[str, Any]:
    """The float32 model outputs as bfloat16; the oracle reads the same numbers."""
    names = ("logits", "hidden_states", "lm_head", "lm_head_bias")
    return {
        key: value.astype(ml_dtypes.bfloat16) if key in names else value
        for key, value in inputs.items()
    }


# Multi-token prediction ---------------------------------------------------------

# The terms that other tests cover, switched off.
QUIET = {
    "use_ngram_penalty": False,
    "use_immediate_repetition_penalty": False,
    "adaptive_temperature": False,
}


def draw_tokens(rng: Generator) -> tuple[dict, dict[str, Any]]:
    """(the vocabulary's config, targets with mask and segments)."""
    rows, length, vocab = pick(rng, SMALL_SHAPES)
    targets = spoil_targets(rng, draw_targets(rng, (rows, length), vocab), -100)
    kind = pick(rng, ["none", "bool", "float", "float", "empty"])
    segments = draw_segments(rng, targets.shape) if pick(rng, [True, False]) else None
    inputs = {
        "targets": targets,
        "attention_mask": draw_mask(rng, kind, targets.shape),
        "segment_ids": segments,
    }
    inputs = {key: value for key, value in inputs.items() if value is not None}
    return {"vocab_size": vocab, **QUIET}, inputs


def pair_places(config: dict[str, Any], inputs: dict[str, Any], j: int) -> Any:
    """[B, S]: the positions from which head j predicts a counted token."""
    counted = counted_places(config, inputs)
    segments = inputs.get("segment_ids", np.ones(counted.shape, np.int32))
    places = np.zeros(counted.shape, bool)
    if j < counted.shape[1]:
        pairs = shifted_weights(counted.astype(np.float64), segments, j)
        places[:, : pairs.shape[1]] = pairs != 0
    return places


def deepseek_heads(rng: Generator, heads: int, vocab: int) -> dict[str, Any]:
    """Parameters in the layout of `MTPHeads`."""
    return {
        "norm": {
            "scale": draw_logits(rng, (WIDTH,), 1.0),
            "bias": draw_logits(rng, (WIDTH,), 1.0),
        },
        "heads": {
            "kernel": draw_logits(rng, (heads, WIDTH, vocab), 1.0),
            "bias": draw_logits(rng, (heads, vocab), 1.0),
        },
    }


def plain_mtp_scenario(rng: Generator) -> Scenario:
    """Parallel and sequential heads beside either path."""
    config, inputs = draw_tokens(rng)
    kind = pick(rng, ["parallel", "sequential"])
    heads = int(rng.integers(1, 4 + 1))
    vocab, fused = config["vocab_size"], pick(rng, [True, False])
    config |= {
        "use_mtp": True,
        "mtp_type": kind,
        "hidden_size": WIDTH,
        "num_future_tokens": heads,
        "mtp_weight": 0.3,
        "logit_soft_cap": pick(rng, [None, 4.0]),
    }
    shared = fused_inputs(rng, config, inputs, 2, 1.0)
    if fused or kind == "sequential":
        inputs |= shared
        config["chunk_size"] = pick(rng, [None, 3])
    if not fused:
        inputs["logits"] = path_logits(rng, config, inputs, 1, 2.0, False)
        inputs.pop("hidden_states", None)
    places = [pair_places(config, inputs, j) for j in range(1, heads + 1)]
    if kind == "parallel":
        inputs["mtp_params"] = deepseek_heads(rng, heads, vocab)
        used = np.any(places, axis=0) | (fused & counted_places(config, inputs))
        hidden = draw_logits(rng, (*used.shape, WIDTH), 1.0)
        inputs["hidden_states"] = poison(rng, hidden, used)
    else:
        hidden = draw_logits(rng, (*np.shape(places), WIDTH), 1.0)
        inputs["mtp_hidden_states"] = poison(rng, hidden, np.array(places))
    return Scenario(config, inputs, train=pick(rng, [True, False]))


def draw_confidence(
    rng: Generator, kind: str, config: dict[str, Any], inputs: dict[str, Any]
) -> Any:
    """Scores of the drawn shape, anything where nothing counts."""
    counted = counted_places(config, inputs)
    rows, length = counted.shape
    shape = {"row": (rows,), "column": (rows, 1), "token": (rows, length)}[kind]
    keep = counted if kind == "token" else counted.any(axis=1).reshape(shape)
    scores = rng.choice([0.125, 0.25, 0.75, 0.875, 0.5], size=shape)
    return np.where(keep, scores, np.nan).astype(np.float32)


def adaptive_mtp_scenario(rng: Generator) -> Scenario:
    """The adaptive loss, as primary and as secondary."""
    config, inputs = draw_tokens(rng)
    primary, heads = pick(rng, [True, False]), int(rng.integers(1, 4 + 1))
    config |= {
        "label_smoothing": pick(rng, [0.0, 0.1]),
        "num_future_tokens": heads,
        "mtp_weight": 0.3,
        "confidence_reg_strength": 0.05,
        "use_confidence_weighting": pick(rng, [True, False]),
        "logit_soft_cap": pick(rng, [None, 4.0]),
    }
    if primary:
        config |= {"primary_loss_type": "adaptive_mtp", "z_loss_weight": 0.01}
    else:
        config |= {"use_mtp": True, "mtp_type": "adaptive"}
    name = pick(rng, ["logits", "primary_logits"]) if primary else "logits"
    inputs[name] = path_logits(rng, config, inputs, 1, 2.0, False)
    places = [pair_places(config, inputs, j) for j in range(1, heads + 1)]
    shape = (*np.shape(places), config["vocab_size"] + 2)
    stacked = draw_logits(rng, shape, 2.0)
    stacked[..., config["vocab_size"] :] = 1e4
    stacked = poison(rng, stacked, np.array(places))
    inputs["additional_logits"] = list(stacked) if pick(rng, [True, False]) else stacked
    kind = pick(rng, ["none", "row", "column", "token"])
    if kind != "none":
        inputs["confidence_scores"] = draw_confidence(rng, kind, config, inputs)
    traced = [np.array(True), np.array(False)]
    inputs["mtp_active"] = pick(rng, [True, True, False, *traced])
    return Scenario(config, inputs, train=pick(rng, [True, False]))


# Experts and embeddings ---------------------------------------------------------


def router_shapes(rows: int, length: int) -> dict[str, tuple[int, ...]]:
    """The accepted leading axes of `gate_logits`."""
    return {
        "flat": (rows * length,),
        "batch": (rows, length),
        "layers": (2, rows * length),
        "layers of batch": (2, rows, length),
    }


def expert_inputs(rng: Generator, keep: Any, leading: str, top: int) -> dict[str, Any]:
    """Router and expert outputs, with junk at the masked tokens."""
    shape = router_shapes(*keep.shape)[leading]
    kept = keep if leading in ("batch", "layers of batch") else keep.reshape(-1)
    gates = draw_logits(rng, (*shape, EXPERTS), pick(rng, [0.5, 6.0]))
    gates = poison(rng, gates, np.broadcast_to(kept, shape))
    order = np.argsort(rng.random((*shape, EXPERTS)), axis=-1)
    outputs = draw_logits(rng, (EXPERTS, keep.size, 3), 1.0)
    junk = poison(rng, outputs, np.broadcast_to(keep.reshape(-1), outputs.shape[:2]))
    return {
        "gate_logits": gates,
        "expert_indices": order[..., :top].astype(np.int32),
        "expert_outputs": junk,
    }


def expert_scenario(rng: Generator) -> Scenario:
    """Balancing, auxiliary losses and diversity."""
    config, inputs = draw_tokens(rng)
    inputs["logits"] = path_logits(rng, config, inputs, 0, 1.0, False)
    config |= {
        "num_experts": EXPERTS,
        "use_moe_balancing": pick(rng, [True, True, False]),
        "moe_balancing_type": pick(rng, ["gradient", "bias", "quantile", "quantile"]),
        "balancing_bins": pick(rng, [1, 7, 1000]),
        "bias_momentum": pick(rng, [0.0, 0.0, 0.75]),
        "use_auxiliary_loss": pick(rng, [True, False]),
        "load_balancing_weight": 0.02,
        "use_diversity_loss": pick(rng, [True, False]),
        "diversity_similarity": pick(rng, ["cosine", "l2", "dot"]),
    }
    leading = pick(rng, ["flat", "batch", "layers", "layers of batch"])
    if pick(rng, [True, False, False]):
        kind = pick(rng, ["bool", "int", "float"])
        inputs["router_mask"] = draw_mask(rng, kind, inputs["targets"].shape)
    keep = routed_places(config, inputs)
    inputs |= expert_inputs(rng, keep, leading, int(rng.integers(1, 3 + 1)))
    return Scenario(config, inputs, train=pick(rng, [True, True, False]))


def contrastive_scenario(rng: Generator) -> Scenario:
    """The four contrastive kinds."""
    config, inputs = draw_tokens(rng)
    inputs["logits"] = path_logits(rng, config, inputs, 0, 1.0, False)
    kind = pick(rng, ["infonce", "margin", "triplet", "simctg"])
    config |= {"use_contrastive_loss": True, "contrastive_type": kind}
    if kind == "simctg":
        hidden = draw_logits(rng, (*inputs["targets"].shape, WIDTH), 1.0)
        keep = counted_places(config, inputs)
        inputs["hidden_states"] = poison(rng, hidden, keep)
    else:
        inputs["embeddings"] = draw_logits(rng, (8, WIDTH), 1.0)
        inputs["labels"] = rng.integers(0, 3, 8).astype(np.int32)
    return Scenario(config, inputs)


def scenarios(make: Callable[..., Scenario], *args: str) -> st.SearchStrategy[Scenario]:
    """Calls of the given kind."""
    return SEEDS.map(lambda seed: make(default_rng(seed), *args))

"""The oracles reproduce the reference numbers, which is what makes them oracles."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from support import oracle_batch as batch
from support import oracle_terms as term
from support.golden_cases import (
    HEAD_KINDS,
    GoldenCase,
    call_inputs,
    cases_of,
    compare,
    golden_cases,
)
from support.oracle_terms import Floats, Ints
from support.oracles import statistics, unified_oracle

EXACT = 1e-9
# The reference takes the entropy from log(p + 1e-10).
DIVERSITY = 1e-8
# The log-weights are stored rounded to float32.
ROUNDED_INPUT = {"adaptive_scaling": 1e-8}

CONSTANT_KINDS = ("anti_repetition_schedule",)


@pytest.mark.parametrize("case", cases_of("unified"), ids=lambda case: case.name)
def test_unified_oracle_reproduces_the_reference(case: GoldenCase) -> None:
    tolerance = DIVERSITY if case.config.get("use_ngram_penalty", True) else EXACT
    state = None
    for step, groups in enumerate(case.arrays):
        _, aux, state = unified_oracle(case.config, state, call_inputs(groups["in"]))
        compare(case, step, "out", aux, tolerance)
        compare(case, step, "state", statistics(state), tolerance)


def focal(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    alpha = x.get("alpha", case.config["alpha"])
    rows = [
        term.focal(z, int(y), alpha, case.config["gamma"])
        for z, y in zip(x["inputs"], x["targets"], strict=True)
    ]
    return {"loss": np.mean(rows)}


def label_smoothing(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    rows = [
        term.smoothed_cross_entropy(z, int(y), case.config["smoothing"])
        for z, y in zip(x["inputs"], x["targets"], strict=True)
    ]
    return {"loss": np.mean(rows)}


def consistency(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    rows = batch.consistency(
        x["outputs_original"],
        x["outputs_augmented"],
        case.config["consistency_type"],
        case.config["temperature"],
    )
    return {"loss": np.mean(rows * x.get("confidence_mask", 1.0))}


def perplexity(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    value = batch.perplexity(x["logits"], x["targets"])
    return {"loss": np.log(value), "perplexity": value}


def adaptive_scaling(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    loss, weights = batch.weigh_losses(x["losses"], x["log_weights"])
    return {"loss": loss, "weights": weights}


def contrastive_margin(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    if "labels" in x:
        pairs = batch.label_pairs(x["labels"])
    else:
        pairs = [tuple(p) for p in x["positive_pairs"]], list(x["negative_pairs"])
    normalize = case.config["normalize_embeddings"]
    margin = case.config["margin"]
    value = batch.margin_contrastive(x["embeddings"], *pairs, margin, normalize)
    return {"loss": value}


def expert_diversity(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    outputs = x["expert_outputs"]
    tokens = list(range(outputs.shape[1]))
    metric = case.config["similarity_metric"]
    value = batch.expert_diversity(outputs, tokens, metric)
    return {"loss": value * case.config["diversity_weight"]}


def anti_repetition(case: GoldenCase, x: dict[str, Any]) -> dict[str, Any]:
    cfg = case.config
    return batch.anti_repetition(
        x["logits"],
        x["labels"],
        x.get("attention_mask"),
        eos=cfg["eos_token_id"],
        pad=cfg["pad_token_id"],
        n=cfg["ngram_size"],
    )


ORACLES: dict[str, Callable[[GoldenCase, dict[str, Any]], dict[str, Any]]] = {
    "focal": focal,
    "label_smoothing": label_smoothing,
    "consistency": consistency,
    "perplexity": perplexity,
    "adaptive_scaling": adaptive_scaling,
    "contrastive_margin": contrastive_margin,
    "expert_diversity": expert_diversity,
    "anti_repetition": anti_repetition,
}


@pytest.mark.parametrize("case", cases_of(*ORACLES), ids=lambda case: case.name)
def test_other_oracles_reproduce_the_reference(case: GoldenCase) -> None:
    for step, groups in enumerate(case.arrays):
        arrays = {
            key: x.astype(np.float64) if x.dtype.kind == "f" else x
            for key, x in groups["in"].items()
        }
        tolerance = ROUNDED_INPUT.get(case.kind, EXACT)
        compare(case, step, "out", ORACLES[case.kind](case, arrays), tolerance)


def test_every_kind_has_an_oracle() -> None:
    kinds = {case.kind for case in golden_cases()}
    assert kinds == {"unified", *ORACLES, *CONSTANT_KINDS, *HEAD_KINDS}


# What the reference has no numbers for, worked out by hand ------------------------
#
# Equal logits over 5 classes: every u(c) is U, so a penalty is U · count / tokens.

U = np.log(5 / 4)


def one_row(
    targets: list[int], weights: list[float] | None, segments: list[int] | None
) -> tuple[Floats, Ints, Floats, Ints]:
    ids = np.array([targets])
    ones = [1] * len(targets)
    w, s = np.array([weights or ones], np.float64), np.array([segments or ones])
    return np.zeros((1, len(targets), 5)), ids, w, s


@pytest.mark.parametrize(
    ("targets", "weights", "segments", "most", "charged"),
    [
        ([1, 2, 1, 3, 1, 2], None, None, 8, 2),
        ([1, 2, 1, 3, 1, 3], None, None, 8, 2),
        ([1, 2, 1, 3, 1, 3], None, None, 1, 1),
        ([1, 2, 1, 3, 1, 2], [1, 1, 0, 1, 1, 1], None, 8, 0),
        ([1, 2, 1, 3, 1, 4], None, [1, 1, 1, 1, 2, 2], 8, 1),
        ([1, 2, 1, 3, 1, 4], None, [1, 1, 1, 2, 2, 2], 8, 0),
    ],
)
def test_ngram_predictions(targets, weights, segments, most, charged) -> None:
    logits, ids, w, s = one_row(targets, weights, segments)
    value = term.ngram_predictions(logits, ids, w, s, 2, most)
    assert value == pytest.approx(U * charged / w.sum())


@pytest.mark.parametrize(
    ("targets", "weights", "segments", "charged"),
    [
        ([4, 4, 4, 2], None, None, 5),
        ([4, 4, 4, 4], None, None, 0),
        ([4, 4, 4, 2], [1, 0, 1, 1], None, 1),
        ([4, 4, 4, 2], [1, 1, 0, 1], None, 0),
        ([4, 4, 4, 2], None, [1, 2, 2, 2], 3),
        ([4] * 14 + [2], None, None, 2 * 10 - 1),
    ],
)
def test_immediate_predictions(targets, weights, segments, charged) -> None:
    logits, ids, w, s = one_row(targets, weights, segments)
    value = term.immediate_predictions(logits, ids, w, s)
    assert value == pytest.approx(U * charged / w.sum())


@pytest.mark.parametrize(("segments", "charged"), [(None, 1), ([1, 2, 2], 2)])
def test_early_eos_predictions(segments, charged) -> None:
    value = term.early_eos_predictions(*one_row([0, 1, 1], None, segments), 0, 2)
    assert value == pytest.approx(U * charged / 3)


@pytest.mark.parametrize(("segments", "charged"), [(None, 5), ([1, 1, 2, 2, 2], 4)])
def test_token_unlikelihood(segments, charged) -> None:
    value = term.token_unlikelihood(*one_row([1, 2, 1, 2, 3], None, segments))
    assert value == pytest.approx(U * charged / 5)


def test_targets_mode_stays_in_its_segment() -> None:
    _, ids, w, s = one_row([4, 4, 4, 4], None, [1, 1, 2, 2])
    assert term.immediate_targets(ids, w, s) == 1
    assert term.immediate_targets(ids, w, s * 0 + 1) == 9
    assert term.ngram_targets(ids, w, s, 2) == 0
    assert term.ngram_targets(ids, w, s * 0 + 1, 2) == 1
    assert term.early_eos_targets(ids, w, s, 4, 1) == 0.5
    assert term.early_eos_targets(ids, w, s * 0 + 1, 4, 1) == 0.25


def test_functions_of_their_own() -> None:
    logits, ids, w, _ = one_row([1, 2, 1, 2, 1], None, None)
    sequence = term.sequence_unlikelihood(logits, ids, w, 2)
    assert sequence[0] == pytest.approx([0, 0, 0, U, U])
    decay = term.repetition_decay(logits, ids, w, 2)
    assert decay[0] == pytest.approx([0, 0, *[-np.log(1 - 0.1)] * 3])


def test_saturated_unlikelihood_is_exact() -> None:
    z = np.array([1e8, 0.0, 0.0])
    assert term.unlikelihood(z, 0) == pytest.approx(1e8 - np.log(2), rel=1e-15)
    assert term.unlikelihood(np.array([0.0, 0.0, -np.inf]), 2) == 0


def test_pad_rules() -> None:
    ids = np.array([[1, 3, 2, 3, 3, 3], [3, 3, 3, 3, 3, 1]])
    different = term.pad_weights(ids, 3, 0)
    assert different.tolist() == [[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]
    same = term.pad_weights(ids, 3, 3)
    assert same.tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]

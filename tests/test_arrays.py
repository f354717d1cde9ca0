"""Integers of any width and weights that are none, wherever they come in."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from support.trees import assert_trees_close

import ava_jax
from ava_jax import losses, metrics, terms
from ava_jax.arrays import NO_ID, as_ids

B, S, D, E = 2, 6, 4, 256
V = 256  # uint8 and int8 hold ids below it, but not V itself
WIDTHS = (np.int8, np.uint8, np.int16, np.uint16, np.uint32, np.int64, np.uint64)
RNG = np.random.default_rng(0)
Z: Any = RNG.normal(size=(B, S, V)).astype(np.float32)
IDS: Any = RNG.integers(0, 100, (B, S), np.int32)
IDS[:, 3:] = IDS[:, :3]
FEW: Any = np.array([[1, 1, 1, 2, 2, 0], [3, 3, 4, 4, 4, 4]], np.int32)
TOP: Any = np.stack([IDS, (IDS + 1) % V], -1)
NEAR: Any = -1 - RNG.random((B, S, 2)).astype(np.float32)
GATES: Any = RNG.normal(size=(B, S, E)).astype(np.float32)
ROWS: Any = RNG.normal(size=(6, D)).astype(np.float32)
CE = ava_jax.compose([terms.CrossEntropy()], vocab_size=V)
EVERY = ava_jax.create_unified_loss(
    vocab_size=V,
    ngram_size=2,
    unlikelihood_weight=0.1,
    contrastive_token_weight=0.1,
    mask_boundaries=True,
)
ROUTED = ava_jax.create_unified_loss(
    vocab_size=V,
    num_experts=E,
    use_moe_balancing=True,
    moe_balancing_type="bias",
    use_auxiliary_loss=True,
)


def ints(*values: Any) -> Any:
    return np.array(values, np.int32)


def call(loss_fn: ava_jax.UnifiedLoss, **inputs: Any) -> Any:
    loss, aux, state = loss_fn(
        loss_fn.init(), **{"logits": Z, "targets": IDS, **inputs}
    )
    return loss, aux, state


def statistics(ids: Any, others: Any) -> Any:
    active = jnp.ones((B, S), bool)
    query = ava_jax.Query(ids, active, {"others": others})
    stats = ava_jax.token_statistics(Z, query, ava_jax.Vocabulary(V))
    return stats.nll, stats.unlikelihood("others")


# Functions of one array of integers, and its values.
INTEGERS: dict[str, tuple[Callable[[Any], Any], np.ndarray]] = {
    "targets": (lambda x: call(EVERY, targets=x, segment_ids=FEW), IDS),
    "segment_ids": (lambda x: call(EVERY, segment_ids=x), FEW),
    "expert_indices": (
        lambda x: call(ROUTED, gate_logits=GATES, expert_indices=x),
        TOP,
    ),
    "teacher_ids": (
        lambda x: ava_jax.distillation_loss(
            logits=Z, teacher_ids=x, teacher_log_probs=NEAR
        ),
        TOP,
    ),
    "teacher_ids of a term": (
        lambda x: call(
            ava_jax.compose([terms.TopKDistillation(V)], vocab_size=V),
            extra_inputs={"teacher_ids": x, "teacher_log_probs": NEAR},
        ),
        TOP,
    ),
    "token_log_probs": (
        lambda x: ava_jax.token_log_probs(targets=x, logits=Z),
        IDS,
    ),
    "token_statistics": (lambda x: statistics(x, TOP), IDS),
    "candidates": (lambda x: statistics(IDS, x), TOP),
    "focal_loss": (
        lambda x: losses.focal_loss(Z, x, alpha=np.linspace(0, 1, V).tolist()),
        IDS,
    ),
    "label_smoothing_loss": (lambda x: losses.label_smoothing_loss(Z, x), IDS),
    "perplexity": (lambda x: losses.perplexity(Z, x), IDS),
    "sequence_unlikelihood": (
        lambda x: losses.sequence_unlikelihood(Z, x, ngram_size=2),
        IDS,
    ),
    "contrastive_token_loss": (lambda x: losses.contrastive_token_loss(Z, x), IDS),
    "its segment_ids": (
        lambda x: losses.contrastive_token_loss(Z, IDS, segment_ids=x),
        FEW,
    ),
    "repetition_decay_loss": (
        lambda x: losses.repetition_decay_loss(Z, x, span_length=3),
        IDS,
    ),
    "span_length": (
        lambda x: losses.repetition_decay_loss(Z, IDS, span_length=x),
        np.array([3, 2], np.int32),
    ),
    "repeat_spans": (lambda x: losses.repeat_spans(x, 9), IDS),
    "anti_repetition_loss": (
        lambda x: losses.anti_repetition_loss(
            Z, x, eos_token_id=int(IDS[0, 0]), pad_token_id=255, ngram_size=2
        ),
        IDS,
    ),
    "router_load": (
        lambda x: losses.router_load(GATES[0], x),
        TOP[0],
    ),
    "load_balancing_loss": (lambda x: losses.load_balancing_loss(GATES[0], x), TOP[0]),
    "sequence_balance_loss": (
        lambda x: losses.sequence_balance_loss(np.exp(GATES), x),
        TOP,
    ),
    "labels": (
        lambda x: losses.contrastive_infonce_loss(ROWS, labels=x),
        np.array([0, 1, 0, 1, 2, 2], np.int32),
    ),
    "positive_pairs": (
        lambda x: losses.contrastive_infonce_loss(ROWS, positive_pairs=x),
        np.array([[0, 1], [2, 3]], np.int32),
    ),
    "negative_pairs": (
        lambda x: losses.contrastive_margin_loss(
            ROWS, positive_pairs=ints([0, 1]), negative_pairs=x
        ),
        np.array([[0, 2], [2, 3]], np.int32),
    ),
    "segment_ids of simctg_loss": (
        lambda x: losses.simctg_loss(Z, segment_ids=x),
        FEW,
    ),
    "repeated_ngrams": (lambda x: metrics.repeated_ngrams(x, ngram_size=2), IDS),
    "distinct_ngrams": (lambda x: metrics.distinct_ngrams(x, ngram_size=2), IDS),
    "longest_loop": (lambda x: metrics.longest_loop(x, max_period=3), IDS),
    "drafts": (lambda x: metrics.accepted_lengths(x, IDS), IDS),
}


@functools.cache
def expected(name: str) -> Any:
    function, values = INTEGERS[name]
    return jax.device_get(jax.jit(lambda: function(jnp.asarray(values)))())


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", INTEGERS)
def test_every_width_is_the_same(name):
    """Those that a uint8 holds, where V and E are 256; NumPy's of 64 bits, too."""
    function, values = INTEGERS[name]
    given = [values.astype(kind) for kind in WIDTHS]
    got = jax.jit(lambda: [function(x) for x in given])()
    for x, one in zip(given, got, strict=True):
        del x
        assert_trees_close(one, expected(name), 1e-6)


def test_every_argument_of_integers_is_among_them():
    """A list that was made by reading: of annotations, in all public functions."""
    functions = [f for f in vars(losses).values() if inspect.isfunction(f)]
    functions += [
        metrics.repeated_ngrams,
        metrics.distinct_ngrams,
        metrics.longest_loop,
    ]
    functions += [metrics.accepted_lengths, ava_jax.token_log_probs]
    known = {
        *INTEGERS,
        "expert_indices",  # by router_load and others
        "token_ids",  # of sequence_unlikelihood
        "spans",  # of repeat_spans
        "ids",  # of metrics
        "verified",  # beside drafts
    }
    for function in functions:
        for name, parameter in inspect.signature(function).parameters.items():
            if "Integer[" in str(parameter.annotation):
                assert name in known, (function, name)


def test_ids_that_32_bits_cannot_hold_are_no_ids():
    wide = np.array([0, 5, 2**31 - 1, 2**31, 2**32 + 5, -(2**31) - 1, 2**62], np.int64)
    want = [0, 5, 2**31 - 1, NO_ID, NO_ID, NO_ID, NO_ID]
    assert as_ids(wide).tolist() == want
    assert as_ids(wide[:5].astype(np.uint64)).tolist() == want[:5]
    unsigned = wide[:4].astype(np.uint32)
    assert jax.jit(as_ids)(unsigned).tolist() == want[:4]
    with jax.enable_x64(True):
        assert jax.jit(as_ids)(wide).tolist() == want
        assert jax.jit(as_ids)(wide[:5].astype(np.uint64)).tolist() == want[:5]


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    "name", ["segment_ids", "labels", "repeated_ngrams", "longest_loop"]
)
def test_labels_of_64_bits_never_merge(name):
    """Outside of jit they are an error; inside they are compared as they are."""
    function, values = INTEGERS[name]
    largest = int(values.max())
    wide = values.astype(np.int64)
    wide[values == largest] = 2**32 + int(values.min())
    with pytest.raises(ValueError, match=f"must fit 32 bits, got {wide.max()}"):
        function(wide)
    with jax.enable_x64(True):
        want, got = jax.jit(function)(values), jax.jit(function)(wide)
        assert_trees_close(got, want, 1e-6)
        with pytest.raises(ValueError, match="must fit 32 bits"):
            function(jnp.asarray(wide))


@pytest.mark.parametrize("name", ["ignore_index", "min_sequence_length", "chunk_size"])
def test_integers_of_a_config_fit_32_bits(name):
    with pytest.raises(ValueError, match=f"{name} must be in .* got {2**31}"):
        ava_jax.create_unified_loss({"vocab_size": V, name: 2**31})


# Weights --------------------------------------------------------------------------

P: Any = -1 - RNG.random((B, S)).astype(np.float32)
KEPT: Any = np.array([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1]], np.float32)
HIDDEN: Any = RNG.normal(size=(B, S, D)).astype(np.float32)
GATE = ava_jax.heads.ConfidenceGate()

# Functions of a mask, its name there, and what is kept of the mask [B, S].
MASKS: dict[str, tuple[Callable[[Any], Any], str, Any]] = {
    "loss": (
        lambda m: call(EVERY, attention_mask=m, segment_ids=FEW),
        "attention_mask",
        None,
    ),
    "normalizers": (
        lambda m: CE.normalizers(targets=IDS, attention_mask=m),
        "attention_mask",
        None,
    ),
    "routers": (
        lambda m: call(ROUTED, gate_logits=GATES, expert_indices=TOP, router_mask=m),
        "router_mask",
        None,
    ),
    "token_log_probs": (
        lambda m: ava_jax.token_log_probs(targets=IDS, logits=Z, attention_mask=m),
        "attention_mask",
        None,
    ),
    "distillation_loss": (
        lambda m: ava_jax.distillation_loss(
            logits=Z, teacher_logits=2 * Z, attention_mask=m
        ),
        "attention_mask",
        None,
    ),
    "perplexity": (lambda m: losses.perplexity(Z, IDS, m), "weights", None),
    "sequence_unlikelihood": (
        lambda m: losses.sequence_unlikelihood(Z, IDS, m, ngram_size=1),
        "mask",
        None,
    ),
    "contrastive_token_loss": (
        lambda m: losses.contrastive_token_loss(Z, IDS, m),
        "mask",
        None,
    ),
    "repetition_decay_loss": (
        lambda m: losses.repetition_decay_loss(Z, IDS, m, span_length=3),
        "mask",
        None,
    ),
    "anti_repetition_loss": (
        lambda m: losses.anti_repetition_loss(Z, IDS, m),
        "attention_mask",
        None,
    ),
    "policy_loss": (
        lambda m: losses.policy_loss(P, P[:, 0], m, old_log_probs=P - 0.1),
        "mask",
        None,
    ),
    "policy_values": (
        lambda m: losses.policy_values(P, P, m).loss,
        "mask",
        None,
    ),
    "sampler_weights": (lambda m: losses.sampler_weights(P, P - 1, m), "mask", None),
    "sequence_log_probs": (lambda m: losses.sequence_log_probs(P, m), "mask", None),
    "consistency_loss": (
        lambda m: losses.consistency_loss(Z, 2 * Z, weights=m),
        "weights",
        None,
    ),
    "router_load": (
        lambda m: losses.router_load(GATES[0], TOP[0], token_weights=m),
        "token_weights",
        0,
    ),
    "router_z_loss": (
        lambda m: losses.router_z_loss(GATES[0], token_weights=m),
        "token_weights",
        0,
    ),
    "cutoff_histogram": (
        lambda m: losses.cutoff_histogram(
            GATES[0], jnp.zeros(E), 2, bins=4, token_weights=m
        ),
        "token_weights",
        0,
    ),
    "expert_diversity_loss": (
        lambda m: losses.expert_diversity_loss(HIDDEN, token_weights=m),
        "token_weights",
        0,
    ),
    "contrastive_infonce_loss": (
        lambda m: losses.contrastive_infonce_loss(
            ROWS, labels=ints(0, 1, 0, 1, 0, 1), mask=m
        ),
        "mask",
        0,
    ),
    "simctg_loss": (lambda m: losses.simctg_loss(HIDDEN, mask=m), "mask", None),
    "repeated_ngrams": (
        lambda m: metrics.repeated_ngrams(IDS, m, ngram_size=1),
        "mask",
        None,
    ),
    "calibration_bins": (
        lambda m: metrics.calibration_bins(KEPT / 2, KEPT > 0, num_bins=3, weights=m),
        "weights",
        None,
    ),
    "heads": (
        lambda m: GATE.init_with_output(jax.random.key(0), jnp.asarray(HIDDEN), m)[0],
        "attention_mask",
        None,
    ),
}
BAD = {"negative": -1.0, "additive": -1e9, "NaN": np.nan, "infinite": np.inf}


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", MASKS)
def test_a_weight_that_is_none_is_refused_or_left_out(name):
    """Outside of jit it is an error; inside, the token has no weight."""
    function, argument, row = MASKS[name]
    good = KEPT if row is None else KEPT[row]
    run = jax.jit(lambda mask: without_count(function(mask)))
    want, _ = run(good)
    for value in BAD.values():
        bad = np.where(good > 0, good, np.float32(value))
        with pytest.raises(ValueError, match=f"{argument} must hold weights of at "):
            function(bad)
        got, count = run(bad)
        assert_trees_close(got, want, 0)
        if count is not None and argument == "attention_mask":
            assert int(count) == np.sum(good == 0)
    for kind in (bool, np.int32, np.uint8):
        assert_trees_close(run(good.astype(kind))[0], want, 0)


def without_count(result: Any) -> tuple[Any, Any]:
    """A result and, if it is that of a loss, its number of weights that are none."""
    if isinstance(result, tuple) and len(result) == 3:
        aux = dict(result[1])
        return (result[0], aux), aux.pop("num_invalid_weights")
    return result, None


@pytest.mark.usefixtures("unannotated")
def test_checked_says_where_a_weight_is_none():
    for loss_fn, name, inputs in (
        (CE, "attention_mask", {}),
        (ROUTED, "router_mask", {"gate_logits": GATES, "expert_indices": TOP}),
    ):
        given: Any = {"logits": Z, "targets": IDS, **inputs}
        checked = ava_jax.checked(loss_fn)

        def run(mask, given=given, checked=checked, name=name, loss_fn=loss_fn):
            return checked(loss_fn.init(), **given, **{name: mask})

        error, _ = jax.jit(checkify.checkify(run))(np.where(KEPT > 0, 0, -1e9))
        with pytest.raises(
            ValueError, match=f"{name} -1000000000.0 at .0, 2. is no weight"
        ):
            error.throw()


# Routers and boundaries -----------------------------------------------------------


def load_of(**inputs: Any) -> np.ndarray:
    """Which tokens are counted, told by the experts they chose."""
    chosen = np.arange(B * S).reshape(B, S, 1)
    given: Any = {"gate_logits": GATES, "expert_indices": chosen, **inputs}
    stats = ROUTED.accumulate(ROUTED.init(), logits=Z, **{"targets": IDS, **given})[2]
    return np.asarray(stats.terms["moe_balancing"].counts)[: B * S].reshape(B, S)


@pytest.mark.usefixtures("unannotated")
def test_routers_count_every_token_but_padding():
    prompts = np.where(np.arange(S) < 2, -100, IDS)
    np.testing.assert_array_equal(load_of(targets=prompts), np.ones((B, S)))
    outside = np.where(np.arange(S) < 2, V, IDS)
    np.testing.assert_array_equal(load_of(targets=outside), np.ones((B, S)))
    np.testing.assert_array_equal(load_of(attention_mask=KEPT), KEPT)
    np.testing.assert_array_equal(load_of(segment_ids=FEW), FEW != 0)
    both = load_of(attention_mask=KEPT, router_mask=1 - KEPT)
    np.testing.assert_array_equal(both, 1 - KEPT)


@pytest.mark.usefixtures("unannotated")
def test_router_terms_of_micro_batches_are_averaged_by_routed_tokens():
    """One of them holds most of the prompts."""
    targets = np.where(np.arange(S) < np.array([[5], [1]]), -100, IDS)
    routed = np.array([[1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]])
    window: Any = {"targets": targets, "router_mask": routed}
    loss_fn = ava_jax.compose(
        [terms.CrossEntropy(), terms.RouterZLoss(E, weight=1.0)], vocab_size=V
    )
    state, n = loss_fn.init(), loss_fn.normalizers(**window)
    total = 0.0
    for b in range(B):
        row = {k: v[b : b + 1] for k, v in window.items()}
        given: Any = {"gate_logits": GATES[b : b + 1], "expert_indices": TOP[b : b + 1]}
        aux = loss_fn.accumulate(
            state, logits=Z[b : b + 1], normalizers=n, **row, **given
        )[1]
        total += aux["aux_router_z"]
    log_z = np.log(np.exp(GATES.astype(np.float64)).sum(-1))
    want = np.sum(routed * log_z**2) / np.sum(routed)
    np.testing.assert_allclose(total, want, rtol=1e-5)


@pytest.mark.usefixtures("unannotated")
def test_without_boundaries_packed_documents_are_rows_of_their_own():
    documents = [RNG.integers(0, 4, n) for n in (4, 6, 3)]
    ids: Any = np.concatenate(documents)
    segments: Any = np.repeat([1, 2, 3], [4, 6, 3])
    options: dict[str, Any] = {
        "vocab_size": V,
        "ngram_size": 2,
        "unlikelihood_weight": 0.2,
        "eos_token_id": 3,
        "min_sequence_length": 3,
        "use_mtp": True,
        "mtp_type": "sequential",
        "num_future_tokens": 2,
        "adaptive_temperature": False,
    }
    arrays: Any = {
        "hidden_states": RNG.normal(size=(1, 12, D)).astype(np.float32),
        "mtp_hidden_states": RNG.normal(size=(2, 1, 12, D)).astype(np.float32),
    }
    head: Any = RNG.normal(size=(D, V)).astype(np.float32)
    packed = ava_jax.create_unified_loss(options, mask_boundaries=True)
    got = packed(
        packed.init(),
        targets=ids[None, 1:],
        segment_ids=segments[None, 1:],
        lm_head=head,
        **arrays,
    )
    # Rows of 5 targets, the longest document's.
    rows: Any = {"targets": np.full((3, 5), -100)}
    rows |= {
        k: np.zeros((*v.shape[:-3], 3, 5, D), np.float32) for k, v in arrays.items()
    }
    for row, start, n in ((0, 0, 3), (1, 4, 5), (2, 10, 2)):
        rows["targets"][row, :n] = ids[start + 1 : start + 1 + n]
        for name, x in arrays.items():
            rows[name][..., row, :n, :] = x[..., 0, start : start + n, :]
    plain = ava_jax.create_unified_loss(options)
    want = plain(plain.init(), lm_head=head, **rows)
    assert int(got[1]["num_tokens"]) == 10
    assert_trees_close(got[:2], want[:2], 1e-5)
    with_them = plain(
        plain.init(),
        targets=ids[None, 1:],
        segment_ids=segments[None, 1:],
        lm_head=head,
        **arrays,
    )
    assert int(with_them[1]["num_tokens"]) == 12
    with pytest.raises(ValueError, match="mask_boundaries needs segment_ids"):
        packed(packed.init(), targets=ids[None, 1:], lm_head=head, **arrays)

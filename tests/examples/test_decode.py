"""Decoding: with a cache, by sampling, and with drafts of the further heads."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from run_helpers import random_params

import ava_jax
from ava_jax import heads
from trainer.decode.decoder import GREEDY, Decoder, Sampling, before_end, generate
from trainer.decode.speculate import Speculator, speculate
from trainer.model.language_model import LanguageModel, hidden_and_head, loss_inputs
from trainer.model.layers import Batch, ModelConfig

# With few classes a model that has learned nothing often drafts what it says later.
VOCAB, FEW, COUNT, K = 50, 3, 12, 3
HEADS = {
    "parallel": {"use_mtp": True, "num_future_tokens": K},
    "sequential": {"use_mtp": True, "num_future_tokens": K, "mtp_type": "sequential"},
    "adaptive": {"use_mtp": True, "num_future_tokens": K, "mtp_type": "adaptive"},
}
PROMPTS = jax.random.randint(jax.random.key(2), (3, 6), 0, VOCAB)
LENGTHS = jnp.array([6, 3, 4])


@functools.cache
def built(experts=0, vocab=VOCAB, layers=2, sizes=(), **fields):
    """A model and random parameters, with which some drafts are right."""
    config = ava_jax.UnifiedLossConfig(vocab_size=vocab, hidden_size=16, **fields)
    options = {"layers": layers, "experts": experts, **dict(sizes)}
    size = ModelConfig(width=16, heads=2, **options)
    model = LanguageModel(size, config, 64, jnp.float32, True)
    row = jnp.ones((1, 8), jnp.int32)
    params = random_params(model, Batch(row, row, row, row), seed=6)
    return model, cast(dict[str, Any], params)


def by_hand(model, params, prompt, count):
    """Runs the whole row again for every token, without a cache."""
    ids = [int(token) for token in prompt]
    whole = jax.jit(functools.partial(hidden_and_head, model))
    width = len(ids) + count
    for _ in range(count):
        row = jnp.array([ids + [0] * (width - len(ids))])
        places = jnp.arange(width)[None]
        batch = Batch(row, row, jnp.ones_like(row), places)
        hidden, head = whole(params, batch, None)
        ids.append(int(jnp.argmax((hidden[0, len(ids) - 1] @ head)[:VOCAB])))
    return ids[-count:]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sizes": (("kv_heads", 1), ("scan", True), ("attention_block", 4))},
        pytest.param({"experts": 4}, marks=pytest.mark.slow),
    ],
)
def test_the_cache_changes_nothing(options):
    model, params = built(**options)
    made = generate(
        model, params, None, PROMPTS, LENGTHS, jax.random.key(0), count=COUNT
    )
    for row in range(3):
        prompt = PROMPTS[row, : LENGTHS[row]]
        assert made[row].tolist() == by_hand(model, params, prompt, COUNT)


def test_reading_may_go_back():
    model, params = built()
    decoder = Decoder.of(model, 8)
    extend = jax.jit(functools.partial(decoder.extend, params, None))
    cursor = jax.jit(decoder.begin)(params, None, PROMPTS, LENGTHS)
    once = extend(cursor, jnp.array([1, 2, 3]))
    again = once._replace(length=cursor.length)
    twice = extend(again, jnp.array([4, 5, 6]))
    direct = extend(cursor, jnp.array([4, 5, 6]))
    np.testing.assert_allclose(twice.hidden, direct.hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_drafts_change_nothing_but_the_number_of_calls(kind):
    model, params = built(vocab=FEW, layers=1, **HEADS[kind])
    prompts = PROMPTS % FEW
    expected = generate(
        model, params, None, prompts, LENGTHS, jax.random.key(0), count=COUNT
    )
    found = speculate(model, params, None, prompts, LENGTHS, count=COUNT)
    np.testing.assert_array_equal(found.tokens, expected)
    record = jax.tree.map(np.asarray, found.record)
    assert record.accepted.any()
    assert (record.accepted <= record.drafted).all()
    for row, calls in enumerate(np.asarray(found.calls)):
        made = record.accepted[row, :calls] + 1
        # The prompt's call made one token; the last call may go too far.
        assert made[:-1].sum() < COUNT - 1 <= made.sum()
        assert not record.drafted[row, calls:].any()


def heads_of_row(model, params, rows):
    """Which tokens the heads predict [K, B, S], and where a gate trusts them [B, S]."""
    places = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    inputs = loss_inputs(
        model, params, Batch(rows, rows, jnp.ones_like(rows), places), None
    )
    trusted = jnp.asarray(inputs.get("confidence_scores", 1.0)) >= 0.5
    trusted = jnp.broadcast_to(trusted, (*rows.shape, 1))[..., 0]
    depths = inputs.get("mtp_hidden_states")
    if depths is not None:
        logits = depths @ params["lm_head"]
    else:
        own = params["mtp"].get("heads") if "gate" in params["mtp"] else params["mtp"]
        module = heads.MTPHeads(num_heads=K, vocab_size=model.columns)
        logits = module.apply({"params": own}, inputs.get("hidden_states"))
    return jnp.argmax(jnp.asarray(logits)[..., :VOCAB], -1), trusted


@pytest.mark.parametrize("kind", HEADS)
def test_drafts_are_what_the_heads_say_of_the_whole_row(kind):
    model, params = built(layers=1, **HEADS[kind])
    speculator = Speculator.of(model, PROMPTS.shape[1] + COUNT)
    call = jax.jit(functools.partial(speculator.call, params, None))
    reference = jax.jit(functools.partial(heads_of_row, model, params))
    begin = jax.jit(functools.partial(speculator.begin, params, None, count=COUNT))
    state = begin(PROMPTS, LENGTHS)
    kinds = set()
    for _ in range(COUNT - 1):
        said, trusted = map(np.asarray, reference(state.rows))
        for row in np.flatnonzero(~np.asarray(state.is_done)):
            newest = int(state.read[row])
            is_confident = bool(state.confident[row])
            assert is_confident == trusted[row, newest - 1]
            if is_confident:
                drafts = state.rows[row, newest + 1 : newest + 1 + K].tolist()
                assert drafts == said[:, row, newest - 1].tolist()
            kinds.add(is_confident)
        before, (state, calls) = state, call(state)
        wanted = jnp.where(before.confident, K, 0)
        np.testing.assert_array_equal(calls.drafted, wanted)
    assert kinds == ({True, False} if kind == "adaptive" else {True})


def test_a_near_tie_is_decided_as_one_by_one():
    model, params = built(layers=1, **HEADS["parallel"])
    head = np.array(params["lm_head"])
    # Every class has a twin, whose logit differs by less than rounding may.
    head[:, 1:VOCAB:2] = head[:, 0:VOCAB:2] * (1 + 1e-7)
    tied = {**params, "lm_head": jnp.asarray(head)}
    expected = generate(
        model, tied, None, PROMPTS, LENGTHS, jax.random.key(0), count=COUNT
    )
    found = speculate(model, tied, None, PROMPTS, LENGTHS, count=COUNT)
    np.testing.assert_array_equal(found.tokens, expected)
    assert np.asarray(found.record.redone).any()


def test_without_heads_nothing_can_be_drafted():
    model, params = built()
    with pytest.raises(ValueError, match="use_mtp=True"):
        speculate(model, params, None, PROMPTS, LENGTHS, count=COUNT)


def test_sampling_keeps_to_the_likeliest():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    rows = jnp.asarray(np.broadcast_to(logits, (4000, 4)))

    def shares(**options):
        picked = jax.jit(Sampling(**options).pick)(rows, jax.random.key(0))
        return np.bincount(np.asarray(picked), minlength=4) / len(rows)

    np.testing.assert_allclose(shares(temperature=1.0), np.exp(logits), atol=0.03)
    np.testing.assert_allclose(
        shares(temperature=1.0, top_k=2), [2 / 3, 1 / 3, 0, 0], atol=0.03
    )
    # 0.5 alone does not reach 0.6; with the next it does.
    np.testing.assert_allclose(
        shares(temperature=1.0, top_p=0.6), [2 / 3, 1 / 3, 0, 0], atol=0.03
    )
    sharp = np.exp(2 * np.asarray(logits))
    np.testing.assert_allclose(shares(temperature=0.5), sharp / sharp.sum(), atol=0.03)
    assert (GREEDY.pick(rows, jax.random.key(0)) == 0).all()
    assert shares(temperature=1.0, top_p=1e-6)[0] == 1


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_refuses_what_makes_no_sense(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        Sampling(**options)


def test_text_ends_before_the_first_end():
    ids = jnp.array([[1, 9, 2, 9], [1, 2, 3, 4]])
    expected = [[True, False, False, False], [True] * 4]
    assert before_end(ids, 9).tolist() == expected

"""A user's term has the form of a built-in one: candidates, rows, state, weight."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from numpy.typing import NDArray
from support.scenes import B, D, S, V, integers, jitted

import ava_jax
from ava_jax.config import Weight


@dataclasses.dataclass(frozen=True)
class Reward(ava_jax.TokenTerm):
    """Adds `reward · nll` above a running mean of it."""

    name: str = "reward"
    weight: Weight = 0.5
    requires = ("extra_inputs",)

    def init(self):
        return {"mean": jnp.zeros(())}

    def __call__(self, stats, inputs):
        return inputs.extra["reward"] * stats.nll - inputs.state["mean"]

    def update(self, state, statistics, step):
        return {"mean": 0.9 * state["mean"] + 0.1 * statistics}


@dataclasses.dataclass(frozen=True)
class OldReward:
    """The same with the state as an argument, derived from nothing."""

    name: str = "reward"
    weight: Weight = 0.5

    def init(self):
        return {"mean": jnp.zeros(())}

    def apply(self, state, stats, inputs):
        return inputs.extra["reward"] * stats.nll - state["mean"]

    def update(self, state, mean):
        return {"mean": 0.9 * state["mean"] + 0.1 * mean}


@dataclasses.dataclass(frozen=True)
class PlainReward:
    """The newer form, derived from nothing."""

    name: str = "reward"
    weight: Weight = 0.5
    requires: tuple[str, ...] = ("extra_inputs",)

    def init(self):
        return {"mean": jnp.zeros(())}

    def __call__(self, stats, inputs):
        return inputs.extra["reward"] * stats.nll - inputs.state["mean"]

    def update(self, state, statistics, step):
        return {"mean": 0.9 * state["mean"] + 0.1 * statistics}


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A plain term that reads `labels`, beside `extra_inputs` that any term may."""

    name: str = "labelled"
    accepts: tuple[str, ...] = ("labels",)

    def __call__(self, stats, inputs):
        return inputs.extra["reward"] * stats.nll


@dataclasses.dataclass(frozen=True)
class Unlikelihood(ava_jax.TokenTerm):
    """Token unlikelihood without anything of the built-in one."""

    name: str = "own_unlikelihood"
    weight: Weight = 0.3

    def rows(self, tokens):
        return {"ids": tokens.targets, "active": tokens.active, "in": tokens.segments}

    def candidates(self, inputs):
        ids = inputs.rows["ids"][:, None, :]
        return jnp.broadcast_to(ids, (*inputs.targets.shape, ids.shape[-1]))

    def __call__(self, stats, inputs):
        rows, ids = inputs.rows, self.candidates(inputs)
        place = jnp.arange(ids.shape[-1])
        known = rows["active"][:, None] & (rows["in"][:, None] == rows["in"][..., None])
        same = known & (rows["ids"][:, None] == rows["ids"][..., None])
        is_first = ~jnp.any(same & (place < place[:, None]), -1) & rows["active"]
        earlier = is_first[:, None] & (place < inputs.row_positions[..., None])
        earlier &= rows["in"][:, None] == inputs.segments[..., None]
        wanted = earlier & (ids != inputs.targets[..., None])
        return jnp.sum(jnp.where(wanted, stats.unlikelihood(self.name), 0), -1)


@dataclasses.dataclass(frozen=True)
class NextId(ava_jax.TokenTerm):
    """The log-probability of the id after the target, prepared once per step."""

    name: str = "next_id"

    def prepare(self, tokens):
        return (tokens.targets + 1)[..., None] % V

    def candidates(self, inputs):
        return inputs.prepared

    def __call__(self, stats, inputs):
        return stats.candidates[self.name][..., 0] - stats.log_sum


@dataclasses.dataclass(frozen=True)
class SmallStates(ava_jax.BatchTerm):
    """The mean square of the hidden states, and a count of steps."""

    name: str = "small_states"
    weight: Weight = 0.1
    requires = ("hidden_states",)

    def init(self):
        return jnp.zeros((), jnp.int32)

    def __call__(self, call):
        return jnp.mean(call.array("hidden_states") ** 2)

    def update(self, state, statistics, step):
        return state + 1 + step.number


CONFIG = ava_jax.UnifiedLossConfig(vocab_size=V, chunk_size=4)


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {
        "hidden_states": jax.device_put(rng.standard_normal((B, S, D), np.float32)),
        "lm_head": jax.device_put(rng.standard_normal((D, V), np.float32)),
        **integers(experts=False),
    }


def rewarded() -> dict[str, Any]:
    reward = np.random.default_rng(5).standard_normal((B, S), np.float32)
    return {**arrays(), "extra_inputs": {"reward": jax.device_put(reward)}}


def with_logits(given: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in given.items() if k not in ("hidden_states", "lm_head")}
    hidden, head = (np.asarray(given[k]) for k in ("hidden_states", "lm_head"))
    return {**rest, "logits": jax.device_put(hidden @ head)}


def log_p_of(logits: jax.Array, ids: jax.Array | NDArray) -> NDArray[np.float64]:
    """The log-probability of each token's id."""
    z = np.asarray(logits, float)
    log_p = z - np.log(np.sum(np.exp(z), -1, keepdims=True))
    return np.take_along_axis(log_p, np.asarray(ids)[..., None], -1)[..., 0]


def two_steps(loss_fn: ava_jax.UnifiedLoss, given: dict[str, Any]):
    step = jitted(loss_fn)
    _, _, state = step(loss_fn.init(), given)
    return step(state, given)


def test_both_paths_and_all_forms_serve_it():
    given = rewarded()
    terms: list[Any] = [Reward(), OldReward(), PlainReward()]
    losses = [ava_jax.unified_loss(CONFIG, (term,)) for term in terms]
    results = [two_steps(loss_fn, given) for loss_fn in losses]
    results.append(two_steps(losses[0], with_logits(given)))
    for result in results[1:]:
        chex.assert_trees_all_close(result, results[0], rtol=2e-5, atol=1e-6)
    assert float(results[0][2].extra["reward"]["mean"]) != 0


def test_it_adds_its_weighted_mean_to_the_loss():
    given = with_logits(rewarded())
    loss_fn = ava_jax.unified_loss(CONFIG, (Reward(),))
    total, aux, _ = jitted(loss_fn)(loss_fn.init(), given)
    without = ava_jax.unified_loss(CONFIG)
    reward = given.pop("extra_inputs")["reward"]
    loss, _, _ = jitted(without)(without.init(), given)
    np.testing.assert_allclose(total - aux["reward"], loss, rtol=1e-5)
    nll = -log_p_of(given["logits"], given["targets"])
    mask = np.asarray(given["attention_mask"], float)
    mean = np.sum(reward * nll * mask) / np.sum(mask)
    np.testing.assert_allclose(aux["reward"], 0.5 * mean, rtol=1e-5)


def test_masked_tokens_may_hold_anything():
    given, loss_fn = rewarded(), ava_jax.unified_loss(CONFIG, (Reward(),))
    want = two_steps(loss_fn, given)
    reward = np.array(given["extra_inputs"]["reward"])
    reward[~np.asarray(given["attention_mask"])] = np.nan
    assert np.isnan(reward).any()
    extra = {"reward": jax.device_put(reward)}
    got = two_steps(loss_fn, {**given, "extra_inputs": extra})
    chex.assert_trees_all_equal(got, want)


def test_its_weight_may_be_a_schedule():
    term = Reward(weight=optax.constant_schedule(0.0))
    loss_fn = ava_jax.unified_loss(CONFIG, (term,))
    _, aux, _ = jitted(loss_fn)(loss_fn.init(), rewarded())
    assert float(aux["reward"]) == 0


def test_token_unlikelihood_as_a_users_term():
    """It equals the built-in one, value and gradient, in rows of two segments."""
    config = dataclasses.replace(CONFIG, unlikelihood_weight=0.3)
    loss_fn = ava_jax.unified_loss(config, (Unlikelihood(),))
    given = arrays()
    segments = np.tile(np.where(np.arange(S) < 5, 1, 2), (B, 1))
    given["segment_ids"] = jnp.asarray(segments, jnp.int32)

    def entries(lm_head):
        _, aux, _ = loss_fn(loss_fn.init(), **{**given, "lm_head": lm_head})
        return aux["own_unlikelihood"], aux["unlikelihood"]

    @jax.jit
    def values_and_gradients(lm_head):
        values, pull = jax.vjp(entries, lm_head)
        return values, pull((1.0, 0.0)), pull((0.0, 1.0))

    values, own, built_in = values_and_gradients(given["lm_head"])
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
    chex.assert_trees_all_close(own, built_in, rtol=1e-5)
    assert float(values[1]) > 0.01


def test_candidates_that_are_prepared_once_per_step():
    loss_fn = ava_jax.compose([ava_jax.terms.CrossEntropy(), NextId()], vocab_size=V)
    given = with_logits(arrays())
    _, aux, _ = jitted(loss_fn)(loss_fn.init(), given)
    wanted = log_p_of(given["logits"], (np.asarray(given["targets"]) + 1) % V)
    mask = np.asarray(given["attention_mask"], float)
    np.testing.assert_allclose(
        aux["next_id"], np.sum(wanted * mask) / np.sum(mask), rtol=1e-5
    )


def test_a_batch_term_of_ones_own_over_micro_batches():
    loss_fn = ava_jax.unified_loss(CONFIG, (SmallStates(),))
    given, state = arrays(), loss_fn.init()
    del given["attention_mask"]
    whole, aux, after = jitted(loss_fn)(state, given)
    assert int(after.extra["small_states"]) == 1
    assert int(jitted(loss_fn)(after, given)[2].extra["small_states"]) == 3
    mean = np.mean(np.asarray(given["hidden_states"], float) ** 2)
    np.testing.assert_allclose(aux["small_states"], 0.1 * mean, rtol=1e-6)
    counts = jax.jit(loss_fn.normalizers)(targets=given["targets"])
    cuts = [
        {k: v if k == "lm_head" else v[rows] for k, v in jax.device_get(given).items()}
        for rows in (slice(0, 2), slice(2, 4))
    ]
    share = jax.jit(
        lambda given: loss_fn.accumulate(state, normalizers=counts, **given)
    )
    parts = [float(share(cut)[0]) for cut in cuts]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(ava_jax.terms.RESERVED_NAMES))
def test_a_name_of_aux_is_taken(name):
    with pytest.raises(ValueError, match=f"{name}.*taken"):
        ava_jax.unified_loss(CONFIG, (Reward(name=name),))


def test_every_entry_of_aux_is_reserved():
    """Whatever is switched on, aux has no key that a user's term may take."""
    listed = (
        "num_tokens mtp_loss ngram_repetition aux_router_z moe_max_violation "
        "contrastive_loss num_invalid_targets perplexity temperature main_loss "
        "adaptive_mtp_loss main_avg_confidence mtp_head_losses moe_cv focal_loss"
    )
    assert set(listed.split()) <= ava_jax.terms.RESERVED_NAMES


@pytest.mark.parametrize(
    ("term", "error", "words"),
    [
        (object(), TypeError, "TokenTerm"),
        (Reward(name=""), TypeError, "name"),
        (dataclasses.replace(Reward(), weight=np.ones(2)), TypeError, "hashable"),
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_an_object_that_is_no_term_is_an_error(term, error, words):
    with pytest.raises(error, match=words):
        ava_jax.unified_loss(CONFIG, (term,))


def test_two_terms_of_one_name_are_an_error():
    with pytest.raises(ValueError, match="'reward' is taken"):
        ava_jax.unified_loss(CONFIG, (Reward(), Reward(weight=1.0)))


def test_a_plain_term_may_accept_more_arguments():
    loss_fn = ava_jax.unified_loss(CONFIG, (Labelled(),))
    given: Any = {**rewarded(), "labels": np.zeros((B,), np.int32)}
    assert set(loss_fn.select(given)) == set(given)
    _, aux, _ = jitted(loss_fn)(loss_fn.init(), given)
    assert float(aux["labelled"]) != 0


def test_what_it_requires_is_required():
    loss_fn = ava_jax.unified_loss(CONFIG, (Reward(),))
    with pytest.raises(ValueError, match="'reward' needs extra_inputs"):
        loss_fn(loss_fn.init(), **arrays())

"""What a user's token term may have: logits, a temperature, further means, a count."""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from numpy.typing import NDArray
from support.scenes import B, D, S, V, integers
from support.trees import assert_trees_close

import ava_jax
from ava_jax import terms
from ava_jax.config import Weight
from ava_jax.kernel.passes import Columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def over(axis: str, x: jax.Array) -> jax.Array:
    """The sum over the shards of the vocabulary, whose cotangent all of them know."""
    return lax.psum(x, axis)


over.defvjp(lambda axis, x: (lax.psum(x, axis), None), lambda axis, _, c: (c,))


@dataclasses.dataclass(frozen=True)
class Spread(terms.LogitsTerm):
    """The mean square of a token's logits, times what each column weighs."""

    name: str = "spread"
    weight: Weight = 0.3
    columns_extra = ("column_weights",)
    accepts_extra = ("column_weights",)

    def of_logits(self, logits, inputs, vocabulary, precision) -> jax.Array:
        given = inputs.extra.get("column_weights")
        assert given is None or isinstance(given, Columns)
        weights = jnp.ones_like(logits) if given is None else given.value
        total = jnp.sum(weights * logits**2, -1)
        if vocabulary.axis is None:
            return total
        return cast(jax.Array, over(vocabulary.axis, total))


@dataclasses.dataclass(frozen=True)
class Sampled(ava_jax.TokenTerm):
    """A likelihood at a temperature, by rows, that reports two numbers beside it."""

    name: str = "sampled"
    weight: Weight = 2.0
    logits_temperature: float = 0.5
    measured = ("sampled_entropy", "sampled_top")

    def __call__(self, stats, inputs):
        return stats.nll

    def measurements(self, stats, inputs):
        return {
            "sampled_entropy": stats.entropy,
            "sampled_top": stats.is_top.astype(jnp.float32),
        }

    def denominator(self, normalizers):
        return normalizers.active_rows

    def init(self):
        return jnp.zeros(())

    def update(self, state, statistics, step):
        return state + statistics


@dataclasses.dataclass(frozen=True)
class Unnamed(ava_jax.TokenTerm):
    """A term whose measurement has a name that may be taken."""

    name: str = "unnamed"
    measured = ("own",)

    def __call__(self, stats, inputs):
        return stats.nll

    def measurements(self, stats, inputs):
        return dict.fromkeys(self.measured, stats.nll)


def unnamed(entry: str) -> Unnamed:
    """The term with another measurement, by a class of its own."""
    return type("Renamed", (Unnamed,), {"measured": (entry,)})()


@dataclasses.dataclass(frozen=True)
class Norm(ava_jax.TokenTerm):
    """The log-normaliser of the tempered statistics."""

    name: str = "norm"
    logits_temperature: float = 0.5

    def __call__(self, stats, inputs):
        return stats.shift + stats.log_sum_tempered


@dataclasses.dataclass(frozen=True)
class Rewards(ava_jax.BatchTerm):
    """A batch term that reads an entry of `extra_inputs`."""

    name: str = "rewards"
    requires = ("extra_inputs",)

    def __call__(self, call):
        extra: Any = call.inputs.get("extra_inputs")
        return jnp.mean(extra["reward"])


@dataclasses.dataclass(frozen=True)
class Whole(ava_jax.TokenTerm):
    """A term with an array that every block sees whole."""

    name: str = "whole"
    requires = ("labels",)

    def whole(self, inputs):
        labels: Any = inputs.get("labels")
        return labels.astype(jnp.float32)

    def __call__(self, stats, inputs):
        return inputs.whole[inputs.targets] * stats.nll


def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "hidden_states": jax.device_put(rng.standard_normal((B, S, D), np.float32)),
        "lm_head": jax.device_put(rng.standard_normal((D, V), np.float32)),
        **integers(experts=False),
    }


def logits_of(x: dict[str, Any]) -> NDArray[np.float64]:
    hidden, head = (np.asarray(x[name], float) for name in ("hidden_states", "lm_head"))
    return hidden @ head


def log_sum_exp(z: NDArray[np.float64]) -> NDArray[np.float64]:
    top = np.max(z, -1)
    return top + np.log(np.sum(np.exp(z - top[..., None]), -1))


def without_row(x: dict[str, Any], row: int) -> dict[str, Any]:
    """The batch with all tokens of a row masked."""
    mask = np.array(x["attention_mask"])
    mask[row] = False
    return {**x, "attention_mask": jax.device_put(mask)}


def with_logits(x: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in x.items() if k not in ("hidden_states", "lm_head")}
    return {**rest, "logits": jnp.asarray(logits_of(x), jnp.float32)}


def composed(*parts: Any, **options: Any) -> ava_jax.UnifiedLoss:
    given = {"implementation": "cpu", **options}
    return ava_jax.compose(parts, vocab_size=V, **given)


@functools.partial(jax.jit, static_argnums=0)
def run(loss_fn: ava_jax.UnifiedLoss, x: dict[str, Any]) -> Any:
    """The loss, `aux` and the state, and the gradients of `lm_head` or the logits."""
    name = "logits" if "logits" in x else "lm_head"

    def loss(trained):
        value, aux, state = loss_fn(loss_fn.init(), **{**x, name: trained})
        return value, (aux, state)

    (value, (aux, state)), grads = jax.value_and_grad(loss, has_aux=True)(x[name])
    return value, aux, state, grads


def mean(x, values):
    mask = np.asarray(x["attention_mask"], float)
    return np.sum(mask * values) / np.sum(mask)


# Logits ----------------------------------------------------------------------------


def spread_of(x, column_weights: Any = 1.0):
    values = np.sum(column_weights * logits_of(x) ** 2, -1)
    return mean(x, values)


@pytest.mark.parametrize(
    "options",
    [{}, {"chunk_size": 3, "block_size": 2}, {"implementation": "xla"}],
    ids=str,
)
def test_a_term_of_the_logits(options):
    """On both paths, beside a term of their statistics."""
    x = arrays()
    loss_fn = composed(terms.CrossEntropy(), Spread(), **options)
    value, aux, _, gradient = run(loss_fn, x)
    np.testing.assert_allclose(aux["spread"], 0.3 * spread_of(x), rtol=2e-5)
    np.testing.assert_allclose(value, aux["nll"] + aux["spread"], rtol=2e-5)
    given = with_logits(x)
    by_logits = run(loss_fn, given)
    np.testing.assert_allclose(by_logits[0], value, rtol=2e-5)
    of_logits = np.asarray(by_logits[3])
    wanted = np.einsum("bsd,bsv->dv", x["hidden_states"], of_logits)
    assert_trees_close(gradient, wanted, 2e-5)
    assert not np.any(of_logits[~np.asarray(x["attention_mask"])])


@pytest.mark.parametrize("axes", [("b", None), ("a", "b")], ids=str)
def test_constants_by_columns_are_sharded_with_the_vocabulary(axes):
    x = arrays()
    weights = np.random.default_rng(3).random((B, S, V), np.float32)
    x["extra_inputs"] = {"column_weights": jax.device_put(weights)}
    want = run(composed(Spread()), x)
    np.testing.assert_allclose(want[0], 0.3 * spread_of(x, weights), rtol=2e-5)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    rows, columns = axes
    loss_fn = composed(Spread(), mesh=mesh, batch_axes=rows, vocab_axis=columns)
    assert_trees_close(run(loss_fn, x), want, 2e-5)


# A temperature, measurements, a denominator ------------------------------------------


@pytest.mark.parametrize("path", ["fused", "logits"])
def test_a_term_at_a_temperature_with_numbers_and_a_denominator_of_its_own(path):
    x = without_row(arrays(), 1)
    loss_fn = composed(terms.CrossEntropy(), Sampled())
    value, aux, state, _ = run(loss_fn, x if path == "fused" else with_logits(x))
    z = logits_of(x) / 0.5
    log_p = z - log_sum_exp(z)[..., None]
    targets = np.asarray(x["targets"])
    own = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    entropy = -np.sum(np.exp(log_p) * log_p, -1)
    by_rows = np.sum(own * np.asarray(x["attention_mask"])) / (B - 1)
    np.testing.assert_allclose(aux["sampled"], 2 * by_rows, rtol=2e-5)
    np.testing.assert_allclose(aux["sampled_entropy"], mean(x, entropy), rtol=2e-5)
    is_top = np.argmax(log_p, -1) == targets
    np.testing.assert_allclose(aux["sampled_top"], mean(x, is_top), rtol=1e-6)
    np.testing.assert_allclose(value, aux["nll"] + aux["sampled"], rtol=2e-5)
    # The state moves by the unweighted mean.
    np.testing.assert_allclose(state.extra["sampled"], by_rows, rtol=2e-5)


@pytest.mark.parametrize(("temperature", "want"), [(0.5, 0.5), (1.0, 1.6)])
def test_the_temperature_of_the_state_is_for_terms_without_their_own(temperature, want):
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V,
        primary_loss_type="deepseek",
        initial_temperature=1.6,
        implementation="cpu",
    )
    term = Norm(logits_temperature=temperature)
    aux = run(ava_jax.unified_loss(config, (term,)), x := arrays())[1]
    z = logits_of(x)
    # The statistics of an untempered term keep the shift of the logits themselves.
    shift = np.max(z, -1) if temperature == 1 else np.zeros(z.shape[:2])
    norms = log_sum_exp((z - shift[..., None]) / want) + shift
    np.testing.assert_allclose(aux["norm"], mean(x, norms), rtol=2e-5)


def test_its_numbers_add_up_over_micro_batches():
    x, loss_fn = without_row(arrays(), 1), composed(terms.CrossEntropy(), Sampled())
    integers_ = {name: x[name] for name in ("targets", "attention_mask")}
    counts, state = jax.jit(loss_fn.normalizers)(**integers_), loss_fn.init()

    @jax.jit
    def share(x):
        return loss_fn.accumulate(state, normalizers=counts, **x)[::2]

    cuts = [
        {k: v if k == "lm_head" else v[rows] for k, v in jax.device_get(x).items()}
        for rows in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    parts = [jax.device_get(share(cut)) for cut in cuts]
    value, stats = jax.tree.map(lambda *v: jax.device_put(sum(v)), *parts)
    want, aux, after, _ = run(loss_fn, x)
    np.testing.assert_allclose(value, want, rtol=1e-5)

    @jax.jit
    def commit_and_summary(stats):
        got = loss_fn.commit(state, stats)
        return got, loss_fn.summary(got, stats)

    got, summary = commit_and_summary(stats)
    assert_trees_close(got.extra, after.extra, 1e-5)
    assert_trees_close(summary, aux, 1e-5)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_out_of_range_is_an_error(temperature):
    with pytest.raises(ValueError, match="'sampled': logits_temperature must be"):
        composed(Sampled(logits_temperature=temperature))


@pytest.mark.parametrize("name", ["nll", "accuracy", "main_loss", "policy_kl"])
def test_a_measurement_may_not_replace_another_entry(name):
    config = ava_jax.UnifiedLossConfig(vocab_size=V)
    with pytest.raises(ValueError, match=f"'unnamed'.*'{name}' is taken"):
        ava_jax.unified_loss(config, (unnamed(name),))


def test_two_terms_may_not_share_a_measurement():
    with pytest.raises(ValueError, match="'own' is taken"):
        composed(Unnamed(), Unnamed(name="other"))


# Arguments -------------------------------------------------------------------------


def test_an_array_that_every_block_sees_whole():
    x = arrays()
    x["labels"] = jax.device_put(np.arange(V, dtype=np.int32))
    loss_fn = composed(Whole(), chunk_size=4, block_size=2)
    value = run(loss_fn, x)[0]
    z = logits_of(x)
    log_p = z - log_sum_exp(z)[..., None]
    targets = np.asarray(x["targets"])
    own = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(value, mean(x, targets * own), rtol=2e-5)


def entries_selected(loss_fn: ava_jax.UnifiedLoss, x: Any) -> set[str]:
    return set(loss_fn.select(x).get("extra_inputs") or {})


def test_a_batch_term_may_read_any_entry_beside_a_policy():
    x, ones = arrays(), np.ones((B, S), np.float32)
    rewards = {"advantages": ones, "reward": 3 * ones}
    x["extra_inputs"] = jax.device_put(rewards)
    loss_fn = composed(terms.PolicyTerm(), Rewards())
    assert entries_selected(loss_fn, x) == {"advantages", "reward"}
    np.testing.assert_allclose(run(loss_fn, x)[1]["rewards"], 3.0, rtol=1e-6)


def test_entries_that_a_users_term_names_are_checked():
    """Where every term names what it reads, nothing else may be given."""
    x = arrays()
    x["extra_inputs"] = {"reward": jax.device_put(np.ones((B, S), np.float32))}
    loss_fn = composed(terms.CrossEntropy(), Spread())
    assert entries_selected(loss_fn, x) == set()
    with pytest.raises(ValueError, match=r"\['reward'\] is given.*column_weights"):
        loss_fn(loss_fn.init(), **x)


def test_a_loss_of_a_batch_term_alone_reports_the_tokens():
    x = arrays()
    x["extra_inputs"] = {"reward": jax.device_put(np.ones((B, S), np.float32))}
    value, aux, _, gradient = run(composed(Rewards()), x)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)
    del x["extra_inputs"]
    np.testing.assert_allclose(
        aux["nll"], run(composed(terms.CrossEntropy()), x)[0], rtol=1e-6
    )
    assert not np.any(gradient)

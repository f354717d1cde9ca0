"""Policy losses as terms: the numbers of `policy_loss` in one pass; errors."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support.kernel_batches import compile_for
from support.programs import arrays_of, dot_flops
from support.trees import assert_trees_close

import ava_jax
from ava_jax import losses, terms
from ava_jax.config import Weight

B, S, D, V = 4, 6, 5, 13
CONSTANTS = ("old_log_probs", "ref_log_probs", "sampler_weights")
KL = {"kl_weight": 0.3}
K1 = {"kl_estimator": "k1", "kl_importance_weighting": True}
CASES: list[dict[str, Any]] = [
    {"kind": "grpo"},
    {"kind": "grpo", "clip_low": 0.1, "clip_high": 0.3, **KL, "entropy_weight": 0.2},
    {"kind": "grpo", "ratio_cap": 1.5, **KL, **K1},
    {"kind": "bnpo", **KL, "kl_estimator": "k2", "kl_importance_weighting": True},
    {"kind": "dapo", "entropy_weight": 0.2},
    {"kind": "dr_grpo", "max_length": 9, **KL},
    {"kind": "cispo", "clip_high": 1.2, "clip_low": 0.1},
    {"kind": "sapo", "sapo_temperatures": (1.5, 0.5), **KL},
]
AUX = {
    "policy_kl": "kl",
    "clip_fraction": "clip_fraction",
    "mean_ratio": "mean_ratio",
    "policy_entropy": "entropy",
}


def batch(seed: int = 0) -> dict[str, Any]:
    """Rows of several lengths, one of them empty; weights with holes."""
    rng = np.random.default_rng(seed)
    weights = rng.uniform(0.5, 1.5, (B, S))
    weights *= np.arange(S) < np.array([S, 2, 0, 4])[:, None]
    weights[0, 2] = 0
    own = -rng.exponential(1.0, (B, S)) - 1.5
    extra = {
        "advantages": rng.normal(size=(B, S)),
        "old_log_probs": own,
        "ref_log_probs": own + rng.normal(size=(B, S)) / 2,
        "sampler_weights": rng.uniform(0.5, 2.0, (B, S)),
    }
    arrays = {
        "hidden_states": rng.normal(size=(B, S, D)),
        "lm_head": rng.normal(size=(D, V)),
        "attention_mask": weights,
        "extra_inputs": extra,
    }
    floats = jax.tree.map(lambda x: x.astype(np.float32), arrays)
    return jax.device_put({**floats, "targets": rng.integers(0, V, (B, S), np.int32)})


def policy(temperature: float = 1.0, **options: Any) -> terms.PolicyTerm:
    return terms.PolicyTerm(logits_temperature=temperature, **options)


def alone(term: terms.PolicyTerm, **options: Any) -> ava_jax.UnifiedLoss:
    """The loss of one term, with the implementation that a CPU takes anyway."""
    given = {"implementation": "cpu", **options}
    return ava_jax.compose([term], vocab_size=V, **given)


@functools.partial(jax.jit, static_argnums=0)
def run(loss_fn: ava_jax.UnifiedLoss, x: dict[str, Any]) -> Any:
    """The loss, `aux`, and the gradients of all but the integers and the mask."""
    fixed = ("targets", "attention_mask")

    def loss(trained):
        given = {**trained, **{name: x[name] for name in fixed if name in x}}
        return loss_fn(loss_fn.init(), **given)[:2]

    trained = {name: value for name, value in x.items() if name not in fixed}
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return value, aux, grads


@functools.partial(jax.jit, static_argnames=("temperature", "options"))
def by_log_probs(x, temperature, options):
    """The same by `token_log_probs` and `policy_loss`."""

    def loss(trained):
        mask, extra = x["attention_mask"], x["extra_inputs"]
        out = ava_jax.token_log_probs(
            targets=x["targets"],
            attention_mask=mask,
            temperature=temperature,
            implementation="cpu",
            **trained,
        )
        constants = {name: extra[name] for name in CONSTANTS}
        return losses.policy_loss(
            out.log_probs,
            extra["advantages"],
            mask,
            entropy=out.entropy,
            **constants,
            **dict(options),
        )

    trained = {name: x[name] for name in ("hidden_states", "lm_head")}
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    return value, aux, grads


def with_logits(x: dict[str, Any]) -> dict[str, Any]:
    rest = {k: v for k, v in x.items() if k not in ("hidden_states", "lm_head")}
    hidden, head = (np.asarray(x[name]) for name in ("hidden_states", "lm_head"))
    return {**rest, "logits": hidden @ head}


# Numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(map(str, o.values())))
def test_it_is_the_policy_loss_of_log_probabilities(options, temperature):
    x = batch()
    value, aux, grads = run(alone(policy(temperature, **options)), x)
    want, wanted_aux, wanted = by_log_probs(x, temperature, tuple(options.items()))
    np.testing.assert_allclose(value, want, rtol=2e-5)
    assert abs(want) > 0.01
    assert_trees_close({name: grads[name] for name in wanted}, wanted, 2e-5)
    got = {name: aux[name] for name in AUX}
    assert_trees_close(got, {k: wanted_aux[v] for k, v in AUX.items()}, 2e-5)
    for name in ("policy_loss", "main_loss", "total_loss"):
        np.testing.assert_allclose(aux[name], value, rtol=1e-6)


def test_the_temperature_is_its_own():
    """`nll` and `entropy` stay those of temperature 1."""
    x = batch(1)
    _, cold, _ = run(alone(policy(0.5)), x)
    _, warm, _ = run(alone(policy()), x)
    for name in ("nll", "entropy", "accuracy"):
        np.testing.assert_allclose(cold[name], warm[name], rtol=1e-6)
    np.testing.assert_allclose(warm["policy_entropy"], warm["entropy"], rtol=1e-6)
    assert abs(cold["policy_entropy"] - warm["policy_entropy"]) > 0.1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logits_soft_caps_and_padded_columns(temperature):
    """On the logits path, of a padded vocabulary, NaN in the padding."""
    x, term = batch(2), policy(temperature, kind="dapo", **KL)
    given = with_logits(x)
    capped = {**given, "logits": 2 * np.tanh(given["logits"] / 2)}
    want = run(alone(term), capped)
    rows = np.full((B, S, 2), np.nan, np.float32)
    padded = {**given, "logits": np.concatenate([given["logits"], rows], -1)}
    value, aux, grads = run(alone(term, logit_soft_cap=2.0), padded)
    np.testing.assert_allclose(value, want[0], rtol=2e-5)
    assert_trees_close(aux, want[1], 2e-5)
    gradient = np.asarray(grads["logits"])
    np.testing.assert_array_equal(gradient[..., V:], 0)
    slope = 1 - (capped["logits"] / 2) ** 2
    assert_trees_close(gradient[..., :V], slope * np.asarray(want[2]["logits"]), 2e-5)


@pytest.mark.parametrize("options", [CASES[1], CASES[5]], ids=["grpo", "dr_grpo"])
@pytest.mark.parametrize(("path", "temperature"), [("fused", 0.7), ("logits", 1.0)])
def test_masked_tokens_may_hold_anything(options, path, temperature):
    x, loss_fn = batch(3), alone(policy(temperature, **options))
    masked = np.asarray(x["attention_mask"]) == 0

    def spoil(value):
        spoilt = np.array(value)
        spoilt[masked] = np.nan
        return spoilt

    spoilt = {**x, "hidden_states": spoil(x["hidden_states"])}
    spoilt["extra_inputs"] = jax.tree.map(spoil, x["extra_inputs"])
    if path == "logits":
        x, spoilt = with_logits(x), with_logits(spoilt)
    got, want = run(loss_fn, spoilt), run(loss_fn, x)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    source = "hidden_states" if path == "fused" else "logits"
    np.testing.assert_array_equal(np.asarray(got[2][source])[masked], 0)
    assert not any(np.any(g) for g in got[2]["extra_inputs"].values())


def test_without_an_unmasked_token_it_is_zero():
    x = batch(4)
    x["attention_mask"] = jax.device_put(np.zeros((B, S), np.float32))
    for kind in ("grpo", "dapo"):
        value, aux, grads = run(alone(policy(kind=kind)), x)
        assert float(value) == float(aux["mean_ratio"]) == 0
        assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_without_constants_the_ratio_is_one():
    x = batch(5)
    x["extra_inputs"] = {"advantages": x["extra_inputs"]["advantages"]}
    _, aux, grads = run(alone(policy(kind="dapo")), x)
    assert float(aux["mean_ratio"]) == pytest.approx(1)
    assert float(aux["policy_kl"]) == float(aux["clip_fraction"]) == 0
    assert np.any(grads["lm_head"])


# Beside other terms ----------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Confidence(ava_jax.TokenTerm):
    """A user's term that reads an entry of its own, at a temperature of its own."""

    name: str = "confidence"
    weight: Weight = 0.1
    logits_temperature: float = 2.0

    def __call__(self, stats, inputs):
        return inputs.extra["bonus"] * stats.entropy


def test_beside_cross_entropy_and_a_users_term():
    """Terms at three temperatures, of which one reads any entry."""
    x = batch(6)
    numbers = np.cos(np.arange(B * S)).astype(np.float32).reshape(B, S)
    bonus = {"bonus": jax.device_put(numbers)}
    mixed = {**x, "extra_inputs": {**x["extra_inputs"], **bonus}}
    parts = [terms.CrossEntropy(0.1), policy(0.7, **CASES[1], weight=0.5), Confidence()]
    together = ava_jax.compose(parts, vocab_size=V, implementation="cpu")
    value, aux, grads = run(together, mixed)
    losses_, gradients = [], []
    for part, extra in zip(parts, (None, x["extra_inputs"], bonus), strict=True):
        own = {k: v for k, v in x.items() if k != "extra_inputs"}
        own |= {} if extra is None else {"extra_inputs": extra}
        loss_fn = ava_jax.compose([part], vocab_size=V, implementation="cpu")
        one, _, gradient = jax.device_get(run(loss_fn, own))
        losses_.append(one)
        gradients.append({k: gradient[k] for k in ("hidden_states", "lm_head")})
        if part.name in aux:
            np.testing.assert_allclose(aux[part.name], one, rtol=2e-5)
    assert {"policy_loss", "confidence"} <= set(aux)
    np.testing.assert_allclose(value, sum(losses_), rtol=2e-5)
    wanted = jax.tree.map(lambda *g: sum(g), *gradients)
    assert_trees_close({name: grads[name] for name in wanted}, wanted, 2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_under_the_unified_loss_with_a_temperature_in_the_state(temperature):
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V,
        primary_loss_type="deepseek",
        initial_temperature=1.6,
        implementation="cpu",
    )
    x, term = batch(7), policy(temperature, **CASES[1])
    plain = {k: v for k, v in x.items() if k != "extra_inputs"}
    value, aux, grads = run(ava_jax.unified_loss(config, (term,)), x)
    own, main = run(alone(term), x), run(ava_jax.unified_loss(config), plain)
    np.testing.assert_allclose(value, own[0] + main[0], rtol=2e-5)
    np.testing.assert_allclose(aux["policy_loss"], own[0], rtol=2e-5)
    for name in AUX:
        np.testing.assert_allclose(aux[name], own[1][name], rtol=2e-5)
    wanted = np.asarray(own[2]["lm_head"]) + np.asarray(main[2]["lm_head"])
    assert_trees_close(grads["lm_head"], wanted, 2e-5)


@pytest.mark.parametrize(
    "options", [CASES[i] for i in (1, 4, 5, 7)], ids=lambda o: o["kind"]
)
def test_micro_batches_add_up(options):
    """Means over rows and over tokens alike, and the numbers beside the loss."""
    x, loss_fn = batch(8), alone(policy(0.7, **options))
    state = loss_fn.init()
    integers = {name: x[name] for name in ("targets", "attention_mask")}
    counts = jax.jit(loss_fn.normalizers)(**integers)

    @jax.jit
    def share(x):
        def loss(head):
            given = {**x, "lm_head": head, "normalizers": counts}
            value, _, stats = loss_fn.accumulate(state, **given)
            return value, stats

        return jax.value_and_grad(loss, has_aux=True)(x["lm_head"])

    head, rows = x.pop("lm_head"), jax.device_get(x)
    cuts = [
        {**jax.tree.map(lambda v, s=s: v[s], rows), "lm_head": head}
        for s in (slice(0, 1), slice(1, 2), slice(2, 4))
    ]
    parts = [jax.device_get(share(cut)) for cut in cuts]
    (value, stats), gradient = jax.tree.map(lambda *v: jax.device_put(sum(v)), *parts)
    want, aux, grads = run(loss_fn, {**x, "lm_head": head})
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert_trees_close(gradient, grads["lm_head"], 1e-5)

    @jax.jit
    def commit_and_summary(stats):
        after = loss_fn.commit(state, stats)
        return after, loss_fn.summary(after, stats)

    after, summary = commit_and_summary(stats)
    assert int(after.step) == 1
    assert_trees_close(summary, aux, 1e-5)


# How the pass goes -----------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "how",
    [
        {"chunk_size": 4, "block_size": 2},
        {"implementation": "xla", "chunk_size": 3},
        {"implementation": "reference"},
    ],
    ids=str,
)
def test_how_it_is_computed_changes_nothing(temperature, how):
    x, term = batch(9), policy(temperature, **CASES[1])
    assert_trees_close(run(alone(term, **how), x), run(alone(term), x), 2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_programs_of_accelerators(monkeypatch, platform, temperature):
    """A TPU may round the exponentials that the gradient is made of."""
    x, term = batch(12), policy(temperature, **CASES[1])
    want = run(alone(term), x)
    compile_for(monkeypatch, platform, rounds=platform == "tpu")
    # No other test has this size: what is compiled for a CPU is not what is meant.
    got = run(
        alone(term, implementation="xla", chunk_size=5 if platform == "tpu" else 2), x
    )
    assert_trees_close(got[:2], want[:2], 2e-5)
    assert_trees_close(got[2], want[2], 2**-8 if platform == "tpu" else 2e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    "axes",
    [
        {"batch_axes": "a", "vocab_axis": "b"},
        {"batch_axes": "b", "sequence_axis": "a"},
    ],
    ids=lambda axes: "-".join(axes),
)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_on_a_mesh(kind, axes, temperature):
    x, term = batch(10), policy(temperature, **CASES[1])
    want = run(alone(term), x)
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
    tokens = P(axes["batch_axes"], axes.get("sequence_axis"))
    with jax.set_mesh(mesh):
        spread = {
            name: jax.device_put(
                v, NamedSharding(mesh, P() if name == "lm_head" else tokens)
            )
            for name, v in x.items()
        }
        got = run(alone(term, mesh=mesh, **axes), spread)
    assert_trees_close(jax.device_get(got), jax.device_get(want), 2e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_pass_does_it_all(temperature):
    """6·N·D·V flops with the gradient, 2 without; no array of all logits."""
    length, width = 48, 37
    term = policy(temperature, **CASES[1])
    loss_fn = ava_jax.compose(
        [term],
        vocab_size=width,
        chunk_size=8,
        block_size=8,
        implementation="cpu",
    )
    ones = jnp.ones((B, length))
    extra = dict.fromkeys(("advantages", *CONSTANTS), ones)

    def loss(hidden, head):
        given = {"hidden_states": hidden, "lm_head": head, "extra_inputs": extra}
        targets = jnp.ones((B, length), jnp.int32)
        return loss_fn(loss_fn.init(), targets=targets, **given)[0]

    arrays = jnp.ones((B, length, D)), jnp.ones((D, width))
    count = B * length * width
    for function, factor in ((jax.grad(loss, (0, 1)), 6), (loss, 2)):
        jaxpr = jax.make_jaxpr(function)(*arrays).jaxpr
        assert dot_flops(jaxpr) == factor * count * D
        assert max(np.prod(shape) for shape, _ in arrays_of(jaxpr)) < count


# The object ------------------------------------------------------------------------


def test_equal_terms_share_a_program():
    calls = 0

    @functools.partial(jax.jit, static_argnums=0)
    def step(loss_fn, state, x):
        nonlocal calls
        calls += 1
        return loss_fn(state, **x)

    state = alone(policy()).init()
    for seed in range(3):
        loss_fn = alone(policy(kind="sapo", sapo_temperatures=(1.0, 2.0)))
        _, _, state = step(loss_fn, state, batch(seed))
    assert calls == 1
    assert policy(kind="dapo") == policy(kind="dapo") != policy(kind="bnpo")
    assert len({policy(), policy(), policy(0.5)}) == 2


def test_select_and_checked():
    x, loss_fn = batch(11), alone(policy(0.7, **CASES[1]))
    offered: Any = {**x, "teacher_lm_head": jnp.ones((D, V)), "labels": jnp.ones(3)}
    offered["extra_inputs"] = {**x["extra_inputs"], "reward": jnp.ones((B, S))}
    kept = loss_fn.select(offered)
    assert set(kept) == set(x)
    assert set(kept.get("extra_inputs") or {}) == set(x["extra_inputs"])
    state, checked = loss_fn.init(), ava_jax.checked(loss_fn)
    step = jax.jit(checkify.checkify(lambda x: checked(state, **x)[0]))
    error, value = step(kept)
    error.throw()
    np.testing.assert_allclose(value, run(loss_fn, x)[0], rtol=1e-6)


@pytest.mark.parametrize("name", [*AUX, "policy_loss"])
def test_its_entries_of_aux_are_reserved(name):
    config = ava_jax.UnifiedLossConfig(vocab_size=V)
    with pytest.raises(ValueError, match=f"{name}.*taken"):
        ava_jax.unified_loss(config, (Confidence(name=name),))

"""Log-probabilities: the float64 oracle, gradients, dtypes and bad calls."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from support.log_probs_cases import (
    NAMES,
    DrawnCall,
    draw_call,
    evaluate,
    expected,
)
from support.trees import assert_trees_close

import ava_jax
from ava_jax import terms
from ava_jax.kernel import fused
from ava_jax.kernel.platforms import Implementation
from ava_jax.log_probs import TokenLogProbs

IMPLEMENTATIONS: tuple[Implementation | None, ...] = (None, "cpu", "xla", "reference")
B, S, D, V = 2, 9, 5, 17


# The oracle -----------------------------------------------------------------------


def check(call: DrawnCall, tolerance: float, **options: Any) -> None:
    """Compares a call with the oracle; what is masked gets exact zeros."""
    out, grads = evaluate(call, **options)
    values, want = expected(call)
    for name, value in zip(NAMES, values, strict=True):
        got = np.asarray(getattr(out, name))
        np.testing.assert_allclose(
            got, value, rtol=tolerance, atol=tolerance, err_msg=name
        )
        assert not got[~call.active].any(), name
    assert int(out.num_invalid_targets) == call.num_invalid
    for name, grad in grads.items():
        scale = max(np.abs(want[name]).max(), 1.0)
        np.testing.assert_allclose(
            grad, want[name], rtol=0, atol=tolerance * scale, err_msg=name
        )
    size = call.options["vocab_size"]
    for name in {"logits", "hidden_states"} & set(grads):
        assert not np.asarray(grads[name])[~call.active].any(), name
    for name in {"logits", "lm_head", "lm_head_bias"} & set(grads):
        assert not np.asarray(grads[name])[~np.isfinite(call.floats[name])].any()
        if size is not None:
            assert not np.asarray(grads[name])[..., size:].any(), name


@pytest.mark.parametrize(
    "seed",
    [pytest.param(i, marks=[pytest.mark.slow] if i >= 12 else []) for i in range(80)],
)
def test_drawn_calls(seed: int) -> None:
    call = draw_call(np.random.default_rng(seed), IMPLEMENTATIONS[seed % 4])
    with jax.enable_x64(True):
        check(call, 1e-11)


@pytest.mark.parametrize("seed", range(100, 104))
def test_drawn_calls_in_float32(seed: int) -> None:
    call = draw_call(np.random.default_rng(seed), IMPLEMENTATIONS[seed % 4])
    check(call, 2e-5)


def batch(columns: int = V + 3) -> dict[str, jax.Array]:
    """Hidden states that are NaN where the mask is 0, a projection, targets."""
    rng = np.random.default_rng(0)
    mask = rng.random((B, S)) < 0.7
    hidden = rng.normal(size=(B, S, D))
    floats = {
        "hidden_states": np.where(mask[..., None], hidden, np.nan),
        "lm_head": rng.normal(size=(D, columns)),
        "lm_head_bias": rng.normal(size=columns),
    }
    return {
        **{k: jax.device_put(x.astype(np.float32)) for k, x in floats.items()},
        "targets": jax.device_put(rng.integers(0, V, (B, S), np.int32)),
        "attention_mask": jax.device_put(mask),
    }


OPTIONS: dict[str, Any] = {"vocab_size": V, "chunk_size": 4, "block_size": 2}
FLOATS = ("hidden_states", "lm_head", "lm_head_bias")


def weighted(out: TokenLogProbs, names=NAMES) -> jax.Array:
    """A sum over all tokens, with another weight for each value of each token."""
    total = jnp.zeros(())
    for i, name in enumerate(NAMES):
        if name in names:
            value = getattr(out, name)
            weights = jnp.cos(jnp.arange(value.size) + i).reshape(value.shape)
            total += jnp.sum(weights * value)
    return total


def loss_of(arrays: dict[str, jax.Array], **options: Any) -> jax.Array:
    """That sum of a call."""
    given: dict[str, Any] = {**arrays, **OPTIONS, **options}
    return weighted(ava_jax.token_log_probs(**given))


# Gradients ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [*(pytest.param((name,), marks=pytest.mark.slow) for name in NAMES), NAMES]
)
def test_numerical_gradients(names: tuple[str, ...]) -> None:
    """Of each value by itself and of all, for all that is differentiable."""
    with jax.enable_x64(True):
        arrays = batch()
        hidden = jnp.nan_to_num(arrays["hidden_states"])
        floats = {k: arrays[k] for k in FLOATS} | {"hidden_states": hidden}
        floats = {k: v.astype(float) for k, v in floats.items()}

        @jax.jit
        def fused_path(floats, temperature):
            given: dict[str, Any] = {**arrays, **floats}
            out = ava_jax.token_log_probs(
                **given,
                **OPTIONS,
                temperature=temperature,
                logit_soft_cap=4.0,
                implementation="cpu",
            )
            return weighted(out, names)

        @jax.jit
        def logits_path(logits, temperature):
            out = ava_jax.token_log_probs(
                targets=arrays["targets"],
                attention_mask=arrays["attention_mask"],
                logits=logits,
                temperature=temperature,
                vocab_size=V,
                implementation="cpu",
            )
            return weighted(out, names)

        temperature = jnp.asarray(1.3)
        logits = hidden.astype(float) @ floats["lm_head"]
        for function, given in ((fused_path, floats), (logits_path, logits)):
            check_grads(function, (given, temperature), 1, ["rev"], eps=1e-5)


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_what_is_not_used_is_not_differentiated(
    monkeypatch: pytest.MonkeyPatch, implementation: Implementation
) -> None:
    """Unused values, and operands that are constants, cost nothing."""
    seen = []
    real = fused.all_gradients

    def spy(objectives, plan, needed, operands, wanted):
        weights = operands.inputs[0].weights
        seen.append((set(weights), needed.sources[0], needed.kernel, needed.shared))
        return real(objectives, plan, needed, operands, wanted)

    monkeypatch.setattr(fused, "all_gradients", spy)
    arrays = batch()

    def loss(floats, temperature, name):
        out = ava_jax.token_log_probs(
            **{**arrays, **floats},
            **OPTIONS,
            temperature=temperature,
            implementation=implementation,
        )
        return jnp.sum(getattr(out, name))

    jax.eval_shape(
        jax.grad(lambda x: loss({"lm_head": x}, 1.0, "log_z")), batch()["lm_head"]
    )
    jax.eval_shape(
        jax.grad(lambda x: loss({"hidden_states": x}, 1.3, "entropy")),
        arrays["hidden_states"],
    )
    jax.eval_shape(jax.grad(lambda t: loss({}, t, "log_probs")), jnp.asarray(1.3))
    assert seen == [
        ({"log_z"}, False, True, False),
        ({"entropy"}, True, False, False),
        ({"log_probs"}, False, False, True),
    ]


def test_a_value_that_has_no_part_in_the_loss_is_not_differentiated() -> None:
    def loss(hidden):
        arrays = {**batch(), "hidden_states": hidden}
        out = ava_jax.token_log_probs(**arrays, **OPTIONS, implementation="cpu")
        return jnp.sum(hidden) + jax.lax.stop_gradient(jnp.sum(out.log_z))

    gradient = jax.jit(jax.grad(loss))(np.zeros((B, S, D), np.float32))
    np.testing.assert_array_equal(gradient, np.ones((B, S, D)))


# Transformations ------------------------------------------------------------------


@functools.cache
def value_and_gradient(**options: Any) -> Any:
    """The sum of `batch` and its gradients."""
    arrays = batch()

    @jax.jit
    @jax.value_and_grad
    def run(floats):
        return loss_of({**arrays, **floats}, **options)

    return run({k: arrays[k] for k in FLOATS})


@pytest.mark.parametrize(
    "implementation",
    [
        "cpu",
        *(pytest.param(i, marks=pytest.mark.slow) for i in (None, "xla", "reference")),
    ],
)
def test_vmap(implementation: Implementation | None) -> None:
    """Over several batches of one head, and over several heads."""
    arrays = batch()
    floats = {k: arrays[k] for k in FLOATS}
    scales = jnp.array([0.5, 2.0])

    def gradient(floats, targets):
        given = {**arrays, **floats, "targets": targets}
        return jax.value_and_grad(
            lambda floats: loss_of({**given, **floats}, implementation=implementation)
        )(floats)

    several = {
        "hidden_states": jnp.stack([s * floats["hidden_states"] for s in scales]),
        "lm_head": jnp.stack([s * floats["lm_head"] for s in scales]),
        "lm_head_bias": floats["lm_head_bias"],
    }
    targets = jnp.stack([arrays["targets"], jnp.roll(arrays["targets"], 1, 1)])
    one = jax.jit(gradient)
    for mapped in ("hidden_states", "lm_head"):
        given = {**floats, mapped: several[mapped]}
        axes = {name: 0 if name == mapped else None for name in FLOATS}
        got = jax.jit(jax.vmap(gradient, (axes, 0)))(given, targets)
        each = [one({**floats, mapped: several[mapped][i]}, targets[i]) for i in (0, 1)]
        want = jax.tree.map(lambda *x: jnp.stack(x), *each)
        assert_trees_close(got, want, 2e-6)


def test_inside_scan_and_checkpoint() -> None:
    arrays, loss = batch(), functools.partial(loss_of, implementation="cpu")
    floats = {k: arrays[k] for k in FLOATS}
    want = value_and_gradient()[1]

    @jax.jit
    def scanned(floats):
        def step(total, _):
            own = jax.grad(lambda f: loss({**arrays, **f}))(floats)
            return jax.tree.map(jnp.add, total, own), None

        return jax.lax.scan(step, jax.tree.map(jnp.zeros_like, floats), None, 3)[0]

    @jax.jit
    @jax.grad
    def through_scan(floats):
        def step(total, scale):
            scaled = jax.tree.map(lambda x: scale * x, floats)
            return total + loss({**arrays, **scaled}), None

        return jax.lax.scan(step, jnp.zeros(()), jnp.ones(3))[0]

    @jax.jit
    @jax.grad
    def checkpointed(floats):
        return jax.checkpoint(lambda f: loss({**arrays, **f}))(floats)

    thrice = jax.tree.map(lambda g: 3 * g, want)
    assert_trees_close(scanned(floats), thrice, 2e-6)
    assert_trees_close(through_scan(floats), thrice, 2e-6)
    assert_trees_close(checkpointed(floats), want, 2e-6)


@pytest.mark.parametrize(
    "sizes",
    [
        {"chunk_size": 1, "block_size": 1},
        {"chunk_size": 8, "block_size": 3},
        {"chunk_size": None, "block_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_chunks_and_blocks_of_any_size(
    sizes: Any, implementation: Implementation | None
) -> None:
    got = value_and_gradient(**sizes, implementation=implementation)
    assert_trees_close(got, value_and_gradient(), 2e-6)


# Bad calls ------------------------------------------------------------------------

CALL: dict[str, Any] = {
    "targets": jnp.ones((B, S), jnp.int32),
    "hidden_states": jnp.zeros((B, S, D)),
    "lm_head": jnp.zeros((D, V)),
}
LOGITS: dict[str, Any] = {
    "hidden_states": None,
    "lm_head": None,
    "logits": jnp.zeros((B, S, V)),
}
BAD_CALLS: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"targets": None}, ValueError, ["targets is required", "[B, S]"]),
    ({"targets": CALL["hidden_states"]}, TypeError, ["targets", "float32"]),
    ({"lm_head": None}, ValueError, ["hidden_states [B, S, D] and lm_head [D, V]"]),
    ({"hidden_states": None}, ValueError, ["lm_head needs hidden_states"]),
    ({"lm_head": jnp.zeros((D + 1, V))}, ValueError, ["lm_head", "D=5", "(6, 17)"]),
    ({"lm_head": jnp.zeros(())}, ValueError, ["lm_head", "[D, V]", "float32 ()"]),
    ({"lm_head": jnp.zeros((D, V), int)}, TypeError, ["lm_head", "floating", "int32"]),
    ({"hidden_states": jnp.zeros((B, 3, D))}, ValueError, ["hidden_states", "(2, 9)"]),
    ({"hidden_states": CALL["targets"]}, TypeError, ["hidden_states", "int32"]),
    ({"lm_head_bias": jnp.zeros(3)}, ValueError, ["lm_head_bias", "V=17", "(3,)"]),
    ({"attention_mask": jnp.ones(S)}, ValueError, ["attention_mask", "[B, S]", "(9,)"]),
    ({"vocab_size": 18}, ValueError, ["lm_head", "17", "vocab_size=18"]),
    ({"logits": jnp.zeros((B, S, V))}, ValueError, ["logits", "lm_head", "not both"]),
    (
        {**LOGITS, "hidden_states": CALL["hidden_states"]},
        ValueError,
        ["logits", "hidden_states", "not both"],
    ),
    ({**LOGITS, "logits": jnp.zeros((B, S))}, ValueError, ["logits", "[B, S, V]"]),
    ({**LOGITS, "vocab_size": 18}, ValueError, ["logits", "vocab_size=18"]),
    ({**LOGITS, "chunk_size": 2}, ValueError, ["chunk_size", "2", "leave it out"]),
    ({**LOGITS, "precision": "high"}, ValueError, ["precision", "high", "leave it"]),
    ({"temperature": 0}, ValueError, ["temperature", "(0, inf)", "got 0"]),
    ({"temperature": -0.5}, ValueError, ["temperature", "(0, inf)", "-0.5"]),
    ({"temperature": float("nan")}, ValueError, ["temperature", "nan"]),
    ({"temperature": float("inf")}, ValueError, ["temperature", "(0, inf)", "got inf"]),
    ({"temperature": np.float32(-1)}, ValueError, ["temperature", "(0, inf)"]),
    ({"temperature": jnp.asarray(0.0)}, ValueError, ["temperature", "(0, inf)"]),
    ({"temperature": jnp.ones(S)}, ValueError, ["temperature", "scalar", "(9,)"]),
    ({"temperature": "1"}, TypeError, ["temperature", "str"]),
    ({"temperature": None}, ValueError, ["temperature", "None"]),
    ({"logit_soft_cap": -1.0}, ValueError, ["logit_soft_cap", "-1.0"]),
    ({"chunk_size": 0}, ValueError, ["chunk_size", "got 0"]),
    ({"block_size": 1.5}, TypeError, ["block_size", "1.5"]),
    ({"implementation": "gpu"}, ValueError, ["implementation", "'xla'", "'gpu'"]),
    ({"precision": "best"}, ValueError, ["precision", '"highest"', "'best'"]),
    ({"precision": ["high"]}, ValueError, ["precision", '"highest"', "['high']"]),
    ({"vocab_axis": "model"}, ValueError, ["vocab_axis", "pass mesh="]),
    ({"batch_axes": "data"}, ValueError, ["batch_axes", "pass mesh="]),
]


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(("changed", "error", "words"), BAD_CALLS)
def test_bad_calls(
    changed: dict[str, Any], error: type[Exception], words: list[str]
) -> None:
    with pytest.raises(error) as raised:
        jax.eval_shape(lambda: ava_jax.token_log_probs(**{**CALL, **changed}))
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_the_call_that_they_change_is_good() -> None:
    out = jax.jit(lambda: ava_jax.token_log_probs(**CALL))()
    np.testing.assert_allclose(out.log_probs, -np.log(V), rtol=1e-6)
    out = jax.jit(lambda: ava_jax.token_log_probs(**{**CALL, **LOGITS}))()
    np.testing.assert_allclose(out.entropy, np.log(V), rtol=1e-6)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("precision", ["best", 3, ["high"]])
def test_a_bad_precision_of_other_losses(precision: Any) -> None:
    with pytest.raises(ValueError, match="precision must be None"):
        ava_jax.create_unified_loss(vocab_size=V, precision=precision)
    with pytest.raises(ValueError, match="precision must be None"):
        ava_jax.compose([terms.CrossEntropy()], vocab_size=V, precision=precision)

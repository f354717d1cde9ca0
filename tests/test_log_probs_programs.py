"""What programs of `token_log_probs` compute and store, and how precisely."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback
from support.kernel_batches import compile_for
from support.log_probs_oracle import log_probs_oracle
from support.programs import arrays_of, dot_flops, jaxprs_of
from support.trees import assert_trees_close

import ava_jax
from ava_jax import log_probs, terms
from ava_jax.kernel.platforms import Implementation
from ava_jax.log_probs import TokenLogProbs
from benchmarks.costs import dot_flops as compiled_dot_flops

B, S, D, V = 2, 32, 12, 300
SIZES: dict[str, Any] = {"chunk_size": 8, "block_size": 4}
SLOW = pytest.mark.slow
ARGUMENTS = pytest.mark.parametrize(
    ("arguments", "units"), [((), 2), ((0,), 6), ((1,), 6), ((0, 1), 8)]
)

Loss = Callable[[jax.Array, jax.Array], jax.Array]


def loss_of(**options: Any) -> Loss:
    """Returns a function of hidden states and a projection."""

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        targets = jnp.ones(hidden.shape[:2], jnp.int32)
        out = ava_jax.token_log_probs(
            targets=targets, hidden_states=hidden, lm_head=head, **SIZES, **options
        )
        return jnp.sum(out.log_probs + 2 * out.entropy + 3 * out.log_z)

    return loss


def operands(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    """Returns hidden states and a projection."""
    return jnp.ones((B, S, D), dtype), jnp.ones((D, V), dtype)


def differentiated(loss: Loss, arguments: tuple[int, ...]) -> Callable[..., Any]:
    """Returns the loss, also with its gradient with respect to the arguments."""
    return jax.value_and_grad(loss, argnums=arguments) if arguments else loss


# Costs ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("implementation", ["cpu", "xla", "reference"])
@ARGUMENTS
def test_flops(arguments, units, implementation, temperature) -> None:
    """The gradient computes the logits again: 8, or 6 without one of its products."""
    loss = loss_of(implementation=implementation, temperature=temperature)
    jaxpr = jax.make_jaxpr(differentiated(loss, arguments))(*operands()).jaxpr
    unit = B * S * D * V
    # xla also computes 2 of the 300 logits to estimate the row max.
    passes = 2 if arguments else 1
    sampled = 2 * B * S * D * 2 * passes if implementation == "xla" else 0
    assert dot_flops(jaxpr) == units * unit + sampled


@pytest.mark.usefixtures("optimized_text")
@pytest.mark.parametrize(
    ("arguments", "units"),
    [
        ((), 2),
        pytest.param((0,), 6, marks=SLOW),
        pytest.param((1,), 6, marks=SLOW),
        ((0, 1), 8),
    ],
)
def test_flops_of_the_compiled_program(arguments, units) -> None:
    function = differentiated(loss_of(), arguments)
    text = str(jax.jit(function).lower(*operands()).compile().as_text())
    unit = B * S * D * V
    assert units * unit <= compiled_dot_flops(text) <= 1.02 * units * unit


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_no_array_of_tokens_times_vocabulary(implementation, temperature) -> None:
    """In the program of any platform."""
    loss = loss_of(implementation=implementation, temperature=temperature)
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1)))(*operands()).jaxpr
    found = [shape for shape, _ in arrays_of(jaxpr) if V in shape]
    assert max(np.prod(shape) for shape in found) <= max(B * 8 * V, D * V)


@pytest.mark.parametrize(
    "kept", [0, pytest.param(3, marks=SLOW), 9, pytest.param(32, marks=SLOW)]
)
@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_masked_chunks_are_not_visited(
    monkeypatch: pytest.MonkeyPatch, implementation: Implementation, kept: int
) -> None:
    """Counted at run time, in the forward pass and in that of the gradient."""
    seen = []
    real = log_probs.token_statistics

    def spy(logits, query, vocabulary):
        io_callback(lambda _: seen.append(1), None, query.active, ordered=False)
        return real(logits, query, vocabulary)

    monkeypatch.setattr(log_probs, "token_statistics", spy)
    mask = jnp.zeros((B, S), bool).at[1, 32 - kept :].set(True).at[0, :kept:2].set(True)
    hidden, head = operands()
    hidden = jnp.where(mask[..., None], hidden, jnp.nan)

    def count(function, *arguments):
        seen.clear()
        jax.block_until_ready(function(*arguments))
        jax.effects_barrier()
        return len(seen)

    loss = loss_of(attention_mask=mask, implementation=implementation)
    # The first chunk is always visited.
    chunks = max(-(-kept // 8), 1)
    # Without a gradient, xla iterates over blocks of 4 tokens alone.
    blocks = max(-(-kept // 4), 1) if implementation == "xla" else 2 * chunks
    assert count(jax.jit(loss), hidden, head) == blocks
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    assert count(gradient, hidden, head) == blocks + 2 * chunks


# Precision ------------------------------------------------------------------------


def products(jaxpr: Any) -> list[Any]:
    """Returns the precisions of all products with an array that has V columns."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            shapes = [v.aval.shape for v in (*eqn.invars, *eqn.outvars)]
            if any(V in shape for shape in shapes):
                found.append(eqn.params["precision"])
        for inside in jaxprs_of(eqn):
            found += products(inside)
    return found


def unified(precision: Any, implementation: Any) -> Loss:
    """The unified loss."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, precision=precision, implementation=implementation
    )
    return _of_call(loss_fn)


def composed(precision: Any, implementation: Any) -> Loss:
    """A loss of one term."""
    loss_fn = ava_jax.compose(
        [terms.CrossEntropy()],
        vocab_size=V,
        precision=precision,
        implementation=implementation,
    )
    return _of_call(loss_fn)


def _of_call(loss_fn: Any) -> Loss:
    def loss(hidden, head):
        targets = jnp.ones(hidden.shape[:2], jnp.int32)
        return loss_fn(
            loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=head
        )[0]

    return loss


def alone(precision: Any, implementation: Any) -> Loss:
    """`token_log_probs`."""
    return loss_of(precision=precision, implementation=implementation)


@pytest.mark.parametrize(
    ("make", "implementation"),
    [
        (alone, "cpu"),
        (alone, "xla"),
        (unified, "cpu"),
        (composed, "cpu"),
        *(
            pytest.param(make, implementation, marks=SLOW)
            for make in (alone, unified, composed)
            for implementation in ("reference", None)
        ),
    ],
)
def test_precision_is_that_of_all_three_products(make, implementation) -> None:
    for precision, want in (
        (None, None),
        ("highest", (lax.Precision.HIGHEST,) * 2),
        (lax.Precision.HIGH, (lax.Precision.HIGH,) * 2),
    ):
        loss = make(precision, implementation)
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(*operands()).jaxpr
        found = products(jaxpr)
        assert len(found) >= 3
        assert set(found) == {want}


def assert_exact(out: TokenLogProbs, logits: Any, targets: Any, limit: float) -> None:
    """Compares with float64; errors are relative to max(1, |x|)."""
    logits = np.asarray(logits, np.float64)
    values, _, _ = log_probs_oracle(
        logits,
        np.asarray(targets),
        np.ones(targets.shape, bool),
        np.zeros((3, *targets.shape)),
        vocab_size=logits.shape[-1],
    )
    for got, want in zip((out.log_probs, out.entropy, out.log_z), values, strict=True):
        assert got.dtype == jnp.float32
        error = np.max(np.abs(got - want) / np.maximum(1, np.abs(want)))
        assert error <= limit, error


def of_many_classes(dtype: Any, head_dtype: Any) -> tuple[jax.Array, ...]:
    """Returns operands of 512 features and 4096 classes, and targets."""
    keys = jax.random.split(jax.random.key(1), 3)
    hidden = jax.random.normal(keys[0], (2, 24, 512)).astype(dtype)
    head = 3 * jax.random.normal(keys[1], (512, 4096)) / 512**0.5
    return (
        hidden,
        head.astype(head_dtype),
        jax.random.randint(keys[2], (2, 24), 0, 4096),
    )


@pytest.mark.parametrize(
    ("dtype", "head_dtype", "platform", "limit"),
    [
        (jnp.bfloat16, jnp.bfloat16, "cpu", 2e-6),
        (jnp.bfloat16, jnp.bfloat16, "gpu", 2e-6),
        # Sums of 512 products in float32 err by 1e-5; those of bfloat16 have zeros.
        (jnp.float16, jnp.float16, "cpu", 8e-6),
        (jnp.bfloat16, jnp.float32, "cpu", 8e-6),
        (jnp.bfloat16, jnp.float32, "tpu", 8e-6),
    ],
)
def test_values_are_those_of_float64_on_the_same_operands(
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
    head_dtype: Any,
    platform: str,
    limit: float,
) -> None:
    """Also with operands of 16 bits, and with a float32 projection."""
    if platform != "cpu":
        compile_for(monkeypatch, platform)
    hidden, head, targets = of_many_classes(dtype, head_dtype)

    @jax.jit
    def run(hidden, head):
        return ava_jax.token_log_probs(
            targets=targets, hidden_states=hidden, lm_head=head
        )

    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    assert_exact(run(hidden, head), logits, targets, limit)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_values_of_given_logits_lose_nothing(dtype: Any) -> None:
    """Logits of any dtype are widened, and only their values are as coarse as it."""
    hidden, head, targets = of_many_classes(jnp.float32, jnp.float32)
    logits = (hidden @ head).astype(dtype)
    out = jax.jit(lambda z: ava_jax.token_log_probs(targets=targets, logits=z))(logits)
    assert_exact(out, logits, targets, 3e-7)


def weighted(out: TokenLogProbs, scale: float) -> jax.Array:
    """A sum with a small weight, as the mean over a large batch has."""
    weights = jnp.cos(jnp.arange(out.log_z.size)).reshape(out.log_z.shape)
    values = out.log_probs + 0.3 * out.entropy + 0.1 * out.log_z
    return scale * jnp.sum(weights * values)


@pytest.mark.parametrize(
    ("dtype", "head_dtype"),
    [
        pytest.param(jnp.bfloat16, jnp.bfloat16, marks=SLOW),
        (jnp.float16, jnp.float16),
        (jnp.bfloat16, jnp.float32),
    ],
)
def test_gradients_come_back_in_the_dtype_of_each_operand(dtype, head_dtype) -> None:
    """With weights of 1e-6, which a gradient of logits in float16 would lose."""
    hidden, head, targets = of_many_classes(dtype, head_dtype)

    @jax.jit
    def gradients(hidden, head):
        def loss(operands):
            out = ava_jax.token_log_probs(
                targets=targets, hidden_states=operands[0], lm_head=operands[1]
            )
            return weighted(out, 1e-6)

        return jax.grad(loss)((hidden, head))

    got = gradients(hidden, head)
    assert [g.dtype for g in got] == [dtype, head_dtype]
    want = gradients(hidden.astype(jnp.float32), head.astype(jnp.float32))
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 5e-2
    for one, other in zip(got, want, strict=True):
        one, other = (1e6 * g.astype(jnp.float32) for g in (one, other))
        assert_trees_close(one, other, tolerance)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("log_probs", marks=SLOW),
        "entropy",
        pytest.param("log_z", marks=SLOW),
    ],
)
@pytest.mark.parametrize(("platform", "rounds"), [("tpu", True), ("gpu", False)])
def test_the_programs_of_accelerators(
    monkeypatch: pytest.MonkeyPatch, platform: str, rounds: bool, name: str
) -> None:
    """A TPU differentiates rounded exponentials; no value loses anything by that."""
    keys = jax.random.split(jax.random.key(2), 3)
    hidden = jax.random.normal(keys[0], (2, 20, 16))
    head = jax.random.normal(keys[1], (16, 700))
    targets = jax.random.randint(keys[2], (2, 20), 0, 690)
    mask = jnp.arange(20) < jnp.array([[17], [9]])

    def run(implementation: Implementation | None):
        @jax.jit
        @jax.value_and_grad
        def step(arrays):
            out = ava_jax.token_log_probs(
                targets=targets,
                hidden_states=arrays[0],
                lm_head=arrays[1],
                attention_mask=mask,
                vocab_size=690,
                implementation=implementation,
                chunk_size=8,
            )
            value = getattr(out, name)
            return jnp.sum(jnp.cos(jnp.arange(40)).reshape(2, 20) * value)

        return step((hidden, head))

    value, grads = run("reference")
    compile_for(monkeypatch, platform, rounds=rounds)
    got, got_grads = run(None)
    assert_trees_close(got, value, 2e-6)
    assert_trees_close(got_grads, grads, 1e-2 if rounds else 1e-5)
    if rounds:
        with pytest.raises(AssertionError):
            assert_trees_close(got_grads, grads, 1e-5)

"""What a user's term returns is checked; it costs the statistics that it reads."""

import collections
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from support.scenes import B, D, S, V

import ava_jax
from ava_jax import terms
from ava_jax.config import Weight
from ava_jax.terms.objective import statistics_read, token_inputs
from ava_jax.tokens import read_tokens

TARGETS = jax.ShapeDtypeStruct((B, S), jnp.int32)
LOGITS = jax.ShapeDtypeStruct((B, S, V), jnp.float32)
HIDDEN = jax.ShapeDtypeStruct((B, S, D), jnp.float32)
HEAD = jax.ShapeDtypeStruct((D, V), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Own(ava_jax.TokenTerm):
    """A token term whose methods are functions given by name."""

    name: str = "own"
    weight: Weight = 1.0
    methods: tuple[tuple[str, Any], ...] = ()
    measured: Any = ()

    def __post_init__(self):
        for method, function in self.methods:
            object.__setattr__(self, method, function)

    def __call__(self, stats, inputs):
        return dict(self.methods).get("value", lambda s, i: s.nll)(stats, inputs)


@dataclasses.dataclass(frozen=True)
class OwnBatch(ava_jax.BatchTerm):
    """A batch term that returns what it is given a function for."""

    value: Any
    name: str = "own_batch"

    def __call__(self, call):
        return self.value(call)


@dataclasses.dataclass(frozen=True)
class Old:
    """A term of the older form."""

    value: Any
    name: str = "old"

    def init(self):
        return ()

    def apply(self, state, stats, inputs):
        return self.value(stats, inputs)


@dataclasses.dataclass(frozen=True)
class OfLogits(terms.LogitsTerm):
    """A term of the logits."""

    value: Any
    name: str = "of_logits"

    def of_logits(self, logits, inputs, vocabulary, precision):
        return self.value(logits, inputs)


def traced(term: Any, *, fused: bool = False) -> Any:
    """Traces a training step of the term beside a cross-entropy."""
    loss_fn = ava_jax.compose([terms.CrossEntropy(), term], vocab_size=V, chunk_size=4)
    given = {"hidden_states": HIDDEN, "lm_head": HEAD} if fused else {"logits": LOGITS}
    return jax.eval_shape(
        lambda given: loss_fn(loss_fn.init(), **given), {"targets": TARGETS, **given}
    )


WRONG_VALUES: dict[str, Any] = {
    "mean": lambda x: jnp.mean(x),
    "sum over a row": lambda x: jnp.sum(x, -1),
    "column": lambda x: x[..., None],
    "one token": lambda x: x[:, :1],
    "int": lambda x: x.astype(jnp.int32),
    "bool": lambda x: x > 0,
    "complex": lambda x: x.astype(jnp.complex64),
    "tuple": lambda x: (x, x),
    "list": lambda x: [x],
    "None": lambda x: None,
    "number": lambda x: 0.5,
    "string": lambda x: "nll",
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("wrong", list(WRONG_VALUES))
@pytest.mark.usefixtures("unannotated")
def test_a_value_that_is_not_one_per_token_is_an_error(wrong, fused):
    function = WRONG_VALUES[wrong]
    kinds: list[Any] = [
        Own(methods=(("value", lambda stats, inputs: function(stats.nll)),)),
        Old(lambda stats, inputs: function(stats.nll)),
        OfLogits(lambda logits, inputs: function(jnp.sum(logits, -1))),
    ]
    for term in kinds:
        message = f"'{term.name}' must return a floating-point array .*its value; got"
        with pytest.raises((TypeError, ValueError), match=message):
            traced(term, fused=fused)


def method(name: str, result: Any) -> Own:
    measured = ("size",) if name == "measurements" else ()
    return Own(methods=((name, lambda *_: result),), measured=measured)


WRONG_METHODS = {
    "prepare": (jnp.zeros((B, 2)), "prepare"),
    "rows": (jnp.zeros((B + 1,)), "rows"),
    "whole": ("text", "whole"),
    "candidates": (jnp.zeros((B, S, 2)), "candidates"),
    "denominator": (jnp.ones((2,)), "denominator"),
    "measurements": ({"other": 1}, "measurements"),
    "temperature": (jnp.ones((2,)), "temperature"),
    "counts": ({"spans": jnp.zeros(())}, "counts"),
    "finish": (jnp.zeros(()), "finish"),
    "init": ({"mean": 0.0}, "init"),
    "report": ({"nll": jnp.zeros(())}, "report"),
    "weight_at": (jnp.ones((2,)), "finish: loss"),
}


@pytest.mark.parametrize("name", list(WRONG_METHODS))
@pytest.mark.usefixtures("unannotated")
def test_what_another_method_returns_is_checked(name):
    result, words = WRONG_METHODS[name]
    with pytest.raises((TypeError, ValueError), match=f"'own'.*{words}"):
        traced(method(name, result))


@pytest.mark.parametrize("wrong", ["sum over a row", "bool", "complex", "list", "None"])
@pytest.mark.usefixtures("unannotated")
def test_a_batch_terms_value_is_a_scalar(wrong):
    function = WRONG_VALUES[wrong]
    with pytest.raises((TypeError, ValueError), match=r"own_batch.*value; got"):
        traced(OwnBatch(lambda call: function(jnp.ones((2, 3)))))
    traced(OwnBatch(lambda call: 0.5))


@pytest.mark.parametrize(
    "after",
    [
        lambda state: {"mean": state["mean"][None]},
        lambda state: {"mean": state["mean"].astype(jnp.int32)},
        lambda state: {"mean": 0.0},
        lambda state: {**state, "more": state["mean"]},
        lambda state: None,
    ],
)
@pytest.mark.usefixtures("unannotated")
def test_a_state_keeps_its_form(after):
    init = ("init", lambda: {"mean": jnp.zeros(())})
    term = Own(methods=(init, ("update", lambda state, *_: after(state))))
    with pytest.raises((TypeError, ValueError), match=r"own.*update; got"):
        traced(term)


@pytest.mark.parametrize("name", sorted(terms.RESERVED_NAMES))
def test_compose_refuses_the_names_that_aux_uses(name):
    listed = [terms.CrossEntropy(), Own(name=name)]
    with pytest.raises(ValueError, match=f"{name}.*taken"):
        ava_jax.compose(listed, vocab_size=V)


def test_compose_refuses_a_built_in_term_that_takes_anothers_name():
    for term in (terms.ZLoss(0.1, name="nll"), Own(measured=("perplexity",))):
        with pytest.raises(ValueError, match="is taken"):
            ava_jax.compose([terms.CrossEntropy(), term], vocab_size=V)


def test_an_entry_of_a_report_has_to_be_declared():
    report = ("report", lambda *_: {"own_size": jnp.zeros(())})
    with pytest.raises(ValueError, match=r"'own'.*own_size.*keys"):
        traced(Own(methods=(report,)))
    traced(Own(methods=(report, ("keys", ("own_size",)))))


WRONG_ATTRIBUTES = {
    "measured": "certain",
    "requires_extra": "reward",
    "columns_extra": "teacher",
    "requires": ("hidden",),
    "accepts": "labels",
    "source": "logitz",
    "part": 3,
    "weight": float("nan"),
}


@pytest.mark.parametrize("name", list(WRONG_ATTRIBUTES))
@pytest.mark.usefixtures("unannotated")
def test_an_attribute_that_would_be_half_understood_is_an_error(name):
    term = Own(methods=((name, WRONG_ATTRIBUTES[name]),))
    with pytest.raises((TypeError, ValueError), match=f"'own'.*{name}"):
        ava_jax.compose([terms.CrossEntropy(), term], vocab_size=V)


# The statistics that a term reads -------------------------------------------------


@jax.jit
def halved(stats, shift):
    """A function of all statistics that looks at one."""
    return stats.nll / 2 + 0 * shift


READ = {
    "nll": (lambda s, i: s.nll, {"log_sum", "target"}),
    "a dead read": (lambda s, i: (s.top, s.entropy)[1], {"log_sum", "expected"}),
    "through jit": (lambda s, i: halved(s, s.count), {"log_sum", "target", "count"}),
    "log(1 - p)": (
        lambda s, i: s.log_one_minus_p,
        {"target", "is_top", "log_sum", "queried"},
    ),
    "top": (lambda s, i: s.top.astype(jnp.float32), {"top"}),
    "without top": (
        lambda s, i: s.log_sum_without_top,
        {"second_shift", "second_log_sum"},
    ),
    "the inputs alone": (lambda s, i: i.weights, set()),
    "entropy at T": (
        lambda s, i: s.tempered_entropy,
        {"log_sum_tempered", "expected_tempered", "temperature"},
    ),
}


@pytest.mark.parametrize("name", list(READ))
def test_the_statistics_a_term_reads_are_found_by_tracing_it(name):
    function, wanted = READ[name]
    tokens = read_tokens(jnp.zeros((B, S), jnp.int32), vocab_size=V)
    found = statistics_read(Own(methods=(("value", function),)), token_inputs(tokens))
    assert found == wanted


def vocabulary_operations(term: Any, *, fused: bool) -> collections.Counter[str]:
    """Counts the operations with a vocabulary axis in a step's loss and gradients."""
    width = 777
    loss_fn = ava_jax.compose(
        [term], vocab_size=width, implementation="xla", chunk_size=4, block_size=2
    )
    shapes = {
        "hidden_states": jax.ShapeDtypeStruct((B, S, D), jnp.bfloat16),
        "lm_head": jax.ShapeDtypeStruct((D, width), jnp.bfloat16),
    }
    if not fused:
        shapes = {"logits": jax.ShapeDtypeStruct((B, S, width), jnp.bfloat16)}

    def loss(given, targets):
        return loss_fn(loss_fn.init(), targets=targets, **given)[0]

    counted: collections.Counter[str] = collections.Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            inner = list(jaxprs_in_params(equation.params))
            for own in inner:
                count(own)
            shapes = (
                v.aval.shape
                for v in (*equation.invars, *equation.outvars)
                if hasattr(v.aval, "shape")
            )
            if not inner and any(len(s) > 1 and width in s for s in shapes):
                counted[equation.primitive.name] += 1

    count(jax.make_jaxpr(jax.grad(loss))(shapes, TARGETS).jaxpr)
    return counted


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("read", ["nll", "focal", "z", "entropy"])
def test_a_users_term_costs_what_the_built_in_one_does(read, fused):
    pairs = {
        "nll": (terms.CrossEntropy(), lambda s, i: s.tempered_nll),
        "focal": (
            terms.FocalLoss(),
            lambda s, i: jnp.exp(2 * s.log_one_minus_p) * s.nll,
        ),
        "z": (terms.ZLoss(1.0), lambda s, i: s.log_z**2),
        "entropy": (terms.TokenDiversity(777, 1.0), lambda s, i: -s.entropy),
    }
    built_in, function = pairs[read]
    own = Own(methods=(("value", function),))
    wanted = vocabulary_operations(built_in, fused=fused)
    assert vocabulary_operations(own, fused=fused) == wanted
    asks_for_top = Own(
        methods=(("value", lambda s, i: function(s, i) + s.top.astype(jnp.float32)),)
    )
    more = vocabulary_operations(asks_for_top, fused=fused)
    assert more != wanted


@pytest.mark.parametrize("implementation", ["reference", "cpu", "xla"])
@pytest.mark.parametrize("fused", [False, True])
def test_what_it_reads_has_the_right_value(implementation, fused):
    """The top class, the sum without it and the entropy at T, against NumPy."""
    functions = {
        "top": lambda s, i: s.top.astype(jnp.float32),
        "without": lambda s, i: s.shift + s.log_sum_without_top,
        "at_T": lambda s, i: s.tempered_entropy,
        "certain": lambda s, i: s.log_one_minus_p,
    }
    owns = [
        Own(name=f"own_{name}", methods=(("value", function),))
        for name, function in functions.items()
    ]
    rng = np.random.default_rng(3)
    hidden = rng.standard_normal((B, S, D)).astype(np.float32)
    head = rng.standard_normal((D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    loss_fn = ava_jax.compose(
        [terms.TemperedCrossEntropy(), *owns],
        vocab_size=V,
        implementation=implementation,
        chunk_size=4,
    )
    state = dataclasses.replace(loss_fn.init(), temperature=jnp.float32(0.7))
    z = hidden.astype(float) @ head
    given = {"hidden_states": hidden, "lm_head": head}
    if not fused:
        given = {"logits": z.astype(np.float32)}
    call = functools.partial(loss_fn, train=False)
    given = jax.device_put({**given, "targets": targets})
    _, aux, _ = jax.jit(lambda s, given: call(s, **given))(state, given)
    p, cold = (
        np.exp(x - np.log(np.exp(x).sum(-1, keepdims=True))) for x in (z, z / 0.7)
    )
    others = np.where(np.arange(V) == z.argmax(-1)[..., None], -np.inf, z)
    of_target = np.take_along_axis(p, targets[..., None], -1)[..., 0]
    wanted = {
        "top": z.argmax(-1),
        "without": np.log(np.exp(others).sum(-1)),
        "at_T": -(cold * np.log(cold)).sum(-1),
        "certain": np.log1p(-of_target),
    }
    for name, value in wanted.items():
        np.testing.assert_allclose(aux[f"own_{name}"], value.mean(), rtol=2e-5)

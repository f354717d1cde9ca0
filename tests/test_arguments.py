"""Wrong arguments of every public function: an error that names the argument."""

import inspect
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
import pytest
from support.public_calls import CALLS, CE, IDS, MASK, WITHOUT_ARRAYS, Z

import ava_jax
from ava_jax import losses, metrics, terms

pytestmark = pytest.mark.usefixtures("unannotated")

ARGUMENTS = [
    (name, argument) for name, (_, given) in CALLS.items() for argument in given
]


def with_another_length(x: Any) -> Any:
    """One more along the first axis; what is a number gets one."""
    return np.concatenate([x, x[:1]]) if np.ndim(x) else np.stack([x, x])


WRONG: dict[str, Callable[[Any], Any]] = {
    "a list": lambda x: np.asarray(x).tolist(),
    "a string": lambda x: "x",
    "an object": lambda x: object(),
    "boxed": lambda x: nn.Partitioned(x, (None,) * np.ndim(x)),
    "complex": lambda x: np.asarray(x).astype(np.complex64),
    "one more axis": lambda x: np.asarray(x)[None],
    "of another length": with_another_length,
}
# What a function takes all the same: numbers, and any number of leading axes.
TAKEN = {
    ("fold_temperature", "a list"),
    ("fold_temperature", "one more axis"),
    ("fold_temperature", "boxed"),
    ("effective_mtp_weight", "a list"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_named(name, wrong):
    function, given = CALLS[name]
    jax.eval_shape(lambda: function(**given))
    for argument, value in given.items():
        bad = {**given, argument: WRONG[wrong](value)}
        try:
            jax.eval_shape(lambda bad=bad: function(**bad))
        except (TypeError, ValueError) as error:
            first = str(error).split("\n")[0]
            names = [a for a in given if a in first]
            assert names, (argument, first)
            if wrong not in ("one more axis", "of another length"):
                assert argument in names, (argument, first)
        else:
            allowed = wrong in ("one more axis", "of another length")
            assert allowed or (name, wrong) in TAKEN, (argument, "is accepted")


def test_every_public_function_is_among_them():
    functions = {
        name
        for module in (losses, metrics)
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and not name.startswith("_")
        and function.__module__.startswith(("ava_jax.losses", "ava_jax.metrics"))
    }
    assert functions <= {*CALLS, *WITHOUT_ARRAYS}


@pytest.mark.parametrize("name", CALLS)
def test_numpy_and_jax_arrays_are_the_same(name):
    function, given = CALLS[name]
    want = jax.jit(lambda: function(**given))()
    got = jax.jit(lambda given: function(**given))(given)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# States, records, options -----------------------------------------------------------

ADAPTIVE = ava_jax.create_unified_loss(vocab_size=11, primary_loss_type="adaptive_mtp")
# Of the same parts, but for another number of losses.
FEWER = ava_jax.create_unified_loss(vocab_size=11, temperature_history=12).init()
GIVEN: dict[str, Any] = {"logits": Z, "targets": IDS}
SQUARE: Any = np.eye(11, dtype=np.float32)
ANY: Any = CE  # what it is given has other types than annotated
TEXT: Any = "x"
NONE: Any = None
POLICY: Any = losses.policy_loss
LOG_PROBS: Any = ava_jax.token_log_probs


@pytest.mark.parametrize(
    "state", [None, CE.init, ADAPTIVE.init(), {"step": 0}, 3.0, FEWER]
)
def test_another_state_is_refused(state):
    wanted = "state (must be a LossState, got|is that of another loss)"
    for call in (
        lambda: CE(state, **GIVEN),
        lambda: CE.accumulate(state, **GIVEN),
        lambda: CE.commit(state, CE.accumulate(CE.init(), **GIVEN)[2]),
        lambda: CE.summary(state, CE.accumulate(CE.init(), **GIVEN)[2]),
    ):
        with pytest.raises((TypeError, ValueError), match=wanted):
            jax.eval_shape(call)
    if not isinstance(state, ava_jax.LossState):
        for function in (ava_jax.statistics, ava_jax.reset_statistics):
            with pytest.raises(TypeError, match=wanted):
                function(state)
        with pytest.raises(TypeError, match=wanted):
            ava_jax.fold_temperature(Z, state)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ANY(CE.init(), **GIVEN, normalizers=5.0), "normalizers must be what"),
        (
            lambda: ANY(CE.init(), **GIVEN, extra_inputs=[1]),
            "extra_inputs must be a dict",
        ),
        (
            lambda: ANY(CE.init(), **GIVEN, extra_inputs={"a": [1]}),
            r"extra_inputs\['a'\] must be an array, got list",
        ),
        (
            lambda: CE(CE.init(), **GIVEN, hidden_states=Z, lm_head=SQUARE),
            "pass either logits or hidden_states with lm_head, not both",
        ),
        (
            lambda: ava_jax.distillation_loss(
                logits=Z, hidden_states=Z, lm_head=SQUARE, teacher_logits=Z
            ),
            "either logits or hidden_states with lm_head, not both: got logits and ",
        ),
        (
            lambda: ava_jax.create_unified_loss(vocab_size=11, mesh=TEXT),
            "mesh must be a jax.sharding.Mesh, got str",
        ),
        (
            lambda: CE.commit(CE.init(), cast(Any, None)),
            "stats must be what accumulate",
        ),
        (lambda: CE.summary(CE.init(), cast(Any, 3)), "stats must be what accumulate"),
        (
            lambda: ava_jax.unified_loss(cast(Any, {})),
            "config must be a UnifiedLossConf",
        ),
        (lambda: ava_jax.create_unified_loss(cast(Any, 5)), "config must be a dict"),
        (
            lambda: ava_jax.compose([cast(Any, terms.CrossEntropy)], vocab_size=11),
            "CrossEntropy is a class",
        ),
        (
            lambda: ava_jax.checked(cast(Any, None)),
            "loss_fn must be a UnifiedLoss, got NoneType",
        ),
        (
            lambda: cast(Any, ava_jax.UnifiedLoss)(vocab_size=11),
            r"ava_jax.create_unified_loss\(vocab_size=",
        ),
    ],
)
def test_other_arguments_are_named(call: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ANY(CE.init(), **GIVEN, labels_=IDS), "did you mean 'labels'"),
        (lambda: ANY(CE.init(), **GIVEN, loss_mask=IDS), "here that is attention_mask"),
        (lambda: ANY(CE.init(), **GIVEN, return_detailed=True), "aux, holds all parts"),
        (
            lambda: ava_jax.create_unified_loss(vocab_size=11, mtp_loss_weight=1.0),
            "here that is mtp_weight",
        ),
        (
            lambda: ava_jax.create_unified_loss(vocab_size=11, extra_terms=()),
            "Give it as a term",
        ),
        (
            lambda: POLICY(Z[..., 0], Z[:, 0, 0], MASK, epsilon=0.2),
            "policy_loss has no argument 'epsilon': here that is clip_low and",
        ),
        (
            lambda: losses.policy_loss(Z[..., 0], Z[:, 0, 0], MASK, kind="gspo"),
            "unknown kind 'gspo'; here that is 'grpo' with",
        ),
        (
            lambda: losses.dpo_loss(*[Z[:, 0, 0]] * 4, kind="dpo"),
            "unknown kind 'dpo'; here that is 'sigmoid'",
        ),
        (
            lambda: LOG_PROBS(labels=IDS, logits=Z),
            "has no argument 'labels': here that is targets, shifted",
        ),
    ],
)
def test_names_of_other_libraries_are_known(call: Any, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        call()

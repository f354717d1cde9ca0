"""Second derivatives of every term, and forward mode: right, or an error that helps.

What is right is forward-over-reverse mode of the reference, which is plain JAX, and,
where no gradient is stopped on purpose, the central difference of the gradient.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from support.scenes import EVERYTHING, B, D, E, K, S, V, integers

import ava_jax
from ava_jax import LossInputs, losses, terms
from ava_jax.config import Weight
from ava_jax.kernel.sharding import make_layout

W = 7  # a teacher's width


@dataclasses.dataclass(frozen=True)
class Margin(ava_jax.TokenTerm):
    """A user's term: a hinge on log p of the target against two other ids."""

    name: str = "margin"
    weight: Weight = 0.7

    def candidates(self, inputs):
        return jnp.stack([inputs.targets + 1, inputs.targets + 2], -1) % V

    def __call__(self, stats, inputs):
        others = jnp.sum(stats.unlikelihood(self.name), -1)
        return stats.nll**2 + others + stats.log_one_minus_p * stats.entropy


@dataclasses.dataclass(frozen=True)
class Spread(terms.LogitsTerm):
    """A user's term of all logits."""

    name: str = "spread"
    weight: Weight = 0.3

    def of_logits(self, logits, inputs, vocabulary, precision):
        return jnp.mean(logits**3, -1)


policy = functools.partial(terms.PolicyTerm, kl_weight=0.3, entropy_weight=0.2)


@dataclasses.dataclass(frozen=True)
class Case:
    """A loss whose gradient is differentiated.

    Attributes:
      make: the loss of an implementation.
      floats: names of the further arrays it needs.
      stops: whether a gradient is stopped in it on purpose.
    """

    make: Callable[..., ava_jax.UnifiedLoss]
    floats: tuple[str, ...] = ()
    stops: bool = False


def of_config(*extra: Any, **config: Any) -> Callable[..., ava_jax.UnifiedLoss]:
    def make(**options: Any) -> ava_jax.UnifiedLoss:
        flat = {"vocab_size": V, **config, **options}
        return ava_jax.unified_loss(ava_jax.UnifiedLossConfig(**flat), extra)

    return make


def composed(*parts: Any) -> Callable[..., ava_jax.UnifiedLoss]:
    return functools.partial(ava_jax.compose, parts, vocab_size=V)


ROUTED = ("gate_logits", "expert_outputs")
GRADED = ("advantages", "old_log_probs", "ref_log_probs")
CASES = {
    "everything": Case(
        of_config(**EVERYTHING | {"use_moe_balancing": False}),
        (*ROUTED, "mtp_params"),
    ),
    "focal": Case(
        of_config(
            Margin(),
            Spread(),
            use_focal_loss=True,
            focal_gamma=1.5,
            initial_temperature=1.3,
            contrastive_token_weight=0.5,
            unlikelihood_weight=0.2,
            eos_token_id=2,
            logit_soft_cap=3.0,
            chunk_size=4,
        ),
        ("lm_head_bias",),
    ),
    "likelihood": Case(
        composed(
            terms.CrossEntropy(0.1),
            terms.FocalLoss(gamma=0.5),
            terms.TargetNgrams(2, 0.1),
            terms.TargetRuns(0.1),
            terms.TargetEarlyEOS(2, 5, 0.1),
        ),
    ),
    "tempered": Case(of_config(initial_temperature=0.7)),
    "adaptive": Case(
        of_config(primary_loss_type="adaptive_mtp", num_future_tokens=K),
        ("additional_logits", "confidence_scores"),
    ),
    "adaptive, secondary": Case(
        of_config(use_mtp=True, mtp_type="adaptive", num_future_tokens=K),
        ("additional_logits", "confidence_scores"),
    ),
    "sequential heads": Case(
        of_config(use_mtp=True, mtp_type="sequential", num_future_tokens=K),
        ("mtp_hidden_states",),
    ),
    "grpo": Case(
        composed(policy(kind="grpo", kl_importance_weighting=True)), GRADED, stops=True
    ),
    "sapo": Case(
        composed(policy(kind="sapo", kl_estimator="k2", logits_temperature=0.8)),
        GRADED,
        stops=True,
    ),
    "cispo": Case(composed(policy(kind="cispo")), GRADED, stops=True),
    "teacher's hidden states": Case(
        composed(
            terms.Distillation(0.0, name="forward"),
            terms.Distillation(0.3, 2.0, name="mixed"),
            terms.Distillation(1.0, name="reverse"),
        ),
        ("teacher_hidden_states", "teacher_lm_head"),
        stops=True,
    ),
    "teacher's top k": Case(
        composed(
            terms.TopKDistillation(V, name="with the rest"),
            terms.TopKDistillation(V, False, 2.0, name="alone"),
        ),
        ("teacher_log_probs",),
        stops=True,
    ),
    "balanced by gradient": Case(
        of_config(**EVERYTHING),
        (*ROUTED, "mtp_params"),
        stops=True,
    ),
    "balanced by bias": Case(
        of_config(num_experts=E, use_moe_balancing=True, moe_balancing_type="bias"),
        ("gate_logits",),
        stops=True,
    ),
    "balanced by quantiles": Case(
        of_config(num_experts=E, use_moe_balancing=True, moe_balancing_type="quantile"),
        ("gate_logits",),
        stops=True,
    ),
    "infonce": Case(
        composed(terms.InfoNCE(0.5, 1.0), terms.ExpertDiversity("l2", 1.0)),
        ("embeddings", "expert_outputs"),
    ),
    "pairs": Case(
        composed(terms.Margin(1.5, 1.0), terms.AuxiliaryDiversity("dot", 1.0)),
        ("embeddings", "expert_outputs"),
    ),
    "triplet": Case(composed(terms.Triplet(0.5, 1.0)), ("embeddings",)),
}
IN_EXTRA = {*GRADED, "teacher_hidden_states", "teacher_log_probs", "teacher_ids"}


def drawn(name: str) -> Any:
    """An array of floats, or a tree of them, by its name in a call."""
    rng = np.random.default_rng(sum(map(ord, name)))
    shapes: dict[str, tuple[int, ...]] = {
        "hidden_states": (B, S, D),
        "lm_head": (D, V),
        "logits": (B, S, V),
        "lm_head_bias": (V,),
        "gate_logits": (B, S, E),
        "expert_outputs": (E, B, S, 4),
        "additional_logits": (K, B, S, V),
        "mtp_hidden_states": (K, B, S, D),
        "teacher_hidden_states": (B, S, W),
        "teacher_lm_head": (W, V),
        "embeddings": (6, D),
        "advantages": (B, S),
    }
    if name == "mtp_params":
        norm = {"scale": 1 + rng.normal(size=D) / 10, "bias": rng.normal(size=D)}
        heads = {"kernel": rng.normal(size=(K, D, V)), "bias": rng.normal(size=(K, V))}
        return {"norm": norm, "heads": heads}
    if name == "confidence_scores":
        return rng.uniform(0.6, 0.9, (B, S))
    if name.endswith("log_probs"):
        k = (3,) if name.startswith("teacher") else ()
        return -2 - rng.random((B, S, *k))
    return rng.normal(size=shapes[name])


def batch(case: Case, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays that are differentiated, in float64, and the integers."""
    ints = integers(experts="gate_logits" in case.floats)
    path_names = ("logits",) if path == "logits" else ("hidden_states", "lm_head")
    names = [n for n in (*path_names, *case.floats) if (path, n) not in NOT_BOTH]
    if "mtp_params" in names and "hidden_states" not in names:
        names.append("hidden_states")
    floats = {name: drawn(name) for name in names}
    if "teacher_log_probs" in names:
        places = np.arange(3) * 2
        ints["teacher_ids"] = (np.asarray(ints["targets"])[..., None] + places) % V
    if "embeddings" in names:
        ints["labels"] = np.array([0, 1, 0, 1, 2, 2], np.int32)
    return floats, jax.tree.map(jnp.asarray, ints)


NOT_BOTH = {("logits", "lm_head_bias")}


def total(loss_fn: ava_jax.UnifiedLoss, floats: Any, ints: Any) -> jax.Array:
    """The loss of the arrays, those of `extra_inputs` in their place."""
    given: dict[str, Any] = {**floats, **ints}
    extra = {name: given.pop(name) for name in [*given] if name in IN_EXTRA}
    if extra:
        given["extra_inputs"] = extra
    return loss_fn(loss_fn.init(), **loss_fn.select(cast(LossInputs, given)))[0]


def along(floats: Any, seed: int = 7) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape), floats)


def dot(a: Any, b: Any) -> jax.Array:
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)), start=jnp.zeros(()))


def reverse_twice(f: Callable[[Any], jax.Array], x: Any, v: Any) -> Any:
    return jax.grad(lambda x: dot(jax.grad(f)(x), v))(x)


def forward_over_reverse(f: Callable[[Any], jax.Array], x: Any, v: Any) -> Any:
    return jax.jvp(jax.grad(f), (x,), (v,))[1]


def difference(f: Callable[[Any], jax.Array], x: Any, v: Any) -> Any:
    """The central difference of the gradient, by one program."""
    step = 1e-5
    gradient = jax.jit(
        lambda h: jax.grad(f)(jax.tree.map(lambda x, v: x + h * v, x, v))
    )
    ahead, behind = gradient(step), gradient(-step)
    return jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)


def assert_equal(got: Any, want: Any, tolerance: float = 1e-7) -> None:
    """Compares with the largest number of the whole tree."""
    largest = max(float(np.max(np.abs(x))) for x in jax.tree.leaves(want))
    assert largest > 1e-4
    for (path, a), b in zip(
        jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * largest, err_msg=jax.tree_util.keystr(path)
        )


ONLY = {
    "adaptive": "logits",
    "adaptive, secondary": "logits",
    "sequential heads": "fused",
    "infonce": "logits",
    "pairs": "logits",
    "triplet": "logits",
}
EVERY = [
    (name, path)
    for name in CASES
    for path in ("logits", "fused")
    if ONLY.get(name, path) == path
]


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@functools.cache
def reference(name: str, path: str) -> Any:
    """The right value: the reference's, in forward-over-reverse mode."""
    case = CASES[name]
    floats, ints = batch(case, path)
    f = functools.partial(total, case.make(implementation="reference"), ints=ints)
    return jax.jit(functools.partial(forward_over_reverse, f))(floats, along(floats))


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
@pytest.mark.parametrize(("name", "path"), EVERY)
def test_reverse_over_reverse_mode_is_right(name, path, implementation):
    case = CASES[name]
    floats, ints = batch(case, path)
    f = functools.partial(total, case.make(implementation=implementation), ints=ints)
    got = jax.jit(functools.partial(reverse_twice, f))(floats, along(floats))
    assert_equal(got, reference(name, path))
    if not case.stops and implementation == "cpu":
        assert_equal(got, difference(f, floats, along(floats)), 1e-6)


def test_every_term_is_among_them():
    made = {
        kind
        for case in CASES.values()
        for term in case.make().terms
        for kind in type(term).__mro__
    }
    public = {
        kind
        for kind in vars(terms).values()
        if inspect.isclass(kind) and issubclass(kind, terms.Term)
    }
    assert public <= made


# Other entry points ---------------------------------------------------------------


def log_probs(floats: Any, ints: Any, **options: Any) -> jax.Array:
    found = ava_jax.token_log_probs(**floats, **ints, logit_soft_cap=4.0, **options)
    return jnp.mean(found.log_probs * found.entropy + found.log_z**2)


def distilled(floats: Any, ints: Any, **options: Any) -> jax.Array:
    ints = {"attention_mask": ints["attention_mask"]}
    return ava_jax.distillation_loss(**floats, **ints, beta=0.3, **options)[0]


ENTRIES = {"token_log_probs": log_probs, "distillation_loss": distilled}


def entry(name: str, path: str, **options: Any) -> tuple[Callable[[Any], Any], Any]:
    """A function of floats alone, and the floats."""
    teacher = ("teacher_hidden_states", "teacher_lm_head")
    more = teacher if name == "distillation_loss" else ()
    floats, ints = batch(Case(CASES["tempered"].make, more), path)
    if name == "token_log_probs":
        floats["temperature"] = np.asarray(0.8)
    fixed = {k: jnp.asarray(floats.pop(k)) for k in more}
    return lambda x: ENTRIES[name]({**fixed, **x}, ints, **options), floats


@pytest.mark.parametrize("path", ["logits", "fused"])
@pytest.mark.parametrize("name", ENTRIES)
def test_other_entry_points_are_right_in_reverse_over_reverse_mode(name, path):
    f, floats = entry(name, path)
    v = along(floats)
    got = jax.jit(functools.partial(reverse_twice, f))(floats, v)
    assert_equal(got, difference(f, floats, v), 1e-6)
    plain, _ = entry(name, path, implementation="reference")
    again = jax.jit(functools.partial(forward_over_reverse, plain))(floats, v)
    assert_equal(got, again)


def focal_loss(z, y, **options):
    return losses.focal_loss(z, y, gamma=1.5, **options)


def smoothed(z, y, **options):
    return losses.label_smoothing_loss(z, y, **options)


def anti_repetition(z, y, **options):
    return losses.anti_repetition_loss(z, y, **options)[0]


def repetition_decay(z, y, **options):
    return losses.repetition_decay_loss(z, y, span_length=3, **options)


def sequence_unlikelihood(z, y, **options):
    return losses.sequence_unlikelihood(z, y, ngram_size=1, **options)


OF_LOGITS = [
    focal_loss,
    smoothed,
    anti_repetition,
    repetition_decay,
    sequence_unlikelihood,
    losses.perplexity,
    losses.contrastive_token_loss,
]


@pytest.mark.parametrize("loss", OF_LOGITS)
def test_pure_losses_of_logits_are_right(loss):
    targets = jnp.asarray(integers(experts=False)["targets"])

    def f(z, **options):
        return jnp.sum(loss(z, targets, **options) ** 2)

    z = jnp.asarray(drawn("logits"))
    v = jnp.asarray(along(z))
    got = jax.jit(functools.partial(reverse_twice, f))(z, v)
    plain = functools.partial(f, implementation="reference")
    assert_equal(got, jax.jit(functools.partial(forward_over_reverse, plain))(z, v))
    if loss is not repetition_decay:  # it stops the gradient of the earlier span
        assert_equal(got, difference(f, z, v), 1e-6)


@pytest.mark.parametrize("name", ["everything", "focal", "teacher's hidden states"])
def test_every_mesh_is_right(name):
    case = CASES[name]
    floats, ints = batch(case, "fused")
    axes = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=axes)
    # A user's term of all logits sees those of one device.
    columns = None if name == "focal" else "vocab"
    layout = make_layout(mesh, "data", None, columns)
    loss_fn = dataclasses.replace(case.make(), layout=layout)
    f = functools.partial(total, loss_fn, ints=ints)
    got = jax.jit(functools.partial(reverse_twice, f))(floats, along(floats))
    assert_equal(got, reference(name, "fused"))


def test_the_weights_of_tokens_have_a_mixed_derivative():
    """As in meta-learning: how the gradient moves with the weight of an example."""
    floats, ints = batch(CASES["likelihood"], "fused")
    ints = {"targets": ints["targets"]}

    def slope(weights, **options):
        f = functools.partial(total, CASES["likelihood"].make(**options))
        given = {**ints, "attention_mask": weights}
        return dot(jax.grad(f)(floats, given), along(floats))

    weights = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, (B, S)))
    got = jax.jit(jax.grad(slope))(weights)
    plain = functools.partial(slope, implementation="reference")
    assert_equal(got, jax.jit(jax.grad(plain))(weights))
    step = 1e-5 * np.random.default_rng(1).normal(size=(B, S))
    run = jax.jit(slope)
    want = (run(weights + step) - run(weights - step)) / 2
    np.testing.assert_allclose(np.vdot(got, step), want, rtol=1e-6)


# Forward mode ---------------------------------------------------------------------

NAMED = 'forward-mode differentiation .* pass implementation="reference"'
MODES = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "jvp of grad": lambda f, x: jax.jvp(jax.grad(f), (x,), (x,)),
    "hessian": lambda f, x: jax.hessian(f)(x),
}


def of_likelihood(path: str, **options: Any) -> tuple[Callable[[Any], Any], Any]:
    case = CASES["likelihood"]
    floats, ints = batch(case, path)
    return functools.partial(total, case.make(**options), ints=ints), floats


def of_focal_loss(path: str, **options: Any) -> tuple[Callable[[Any], Any], Any]:
    del path
    targets = jnp.ones((B, S), jnp.int32)
    return lambda z: jnp.sum(losses.focal_loss(z, targets, **options)), drawn("logits")


FUNCTIONS = {
    **{name: functools.partial(entry, name) for name in ENTRIES},
    "loss": of_likelihood,
    "focal_loss": of_focal_loss,
}


@pytest.mark.parametrize("path", ["logits", "fused"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_forward_mode_is_the_references_alone(name, mode, path):
    f, floats = FUNCTIONS[name](path)
    x = jax.tree.map(jnp.asarray, floats)
    run = functools.partial(MODES[mode], f)
    with pytest.raises(TypeError, match=NAMED):
        run(x)
    with pytest.raises(TypeError, match=NAMED):
        jax.jit(run).lower(x)
    plain, _ = FUNCTIONS[name](path, implementation="reference")
    jax.eval_shape(functools.partial(MODES[mode], plain), x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_eager_calls_are_right(name):
    f, floats = FUNCTIONS[name]("fused")
    v = along(floats)
    got = reverse_twice(f, jax.tree.map(jnp.asarray, floats), v)
    plain, _ = FUNCTIONS[name]("fused", implementation="reference")
    want = jax.jit(functools.partial(forward_over_reverse, plain))(floats, v)
    assert_equal(got, want)

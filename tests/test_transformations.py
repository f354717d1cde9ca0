"""Every entry point under JAX's transformations and options, outside of jit as well."""

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.scenes import EVERYTHING, D, E, S, V, floats, integers

import ava_jax
from ava_jax import losses, metrics

BATCH = {**integers(), **floats()}
TOKENS = {name: BATCH[name] for name in ("targets", "attention_mask")}
FUSED = {name: BATCH[name] for name in ("hidden_states", "lm_head")}
GIVEN = {"logits": BATCH["hidden_states"] @ BATCH["lm_head"]}
LOSS = ava_jax.create_unified_loss(vocab_size=V)
ALL = ava_jax.create_unified_loss(EVERYTHING)


def log_probs(**inputs: Any) -> jax.Array:
    return jnp.sum(ava_jax.token_log_probs(**inputs).log_probs)


def distilled(**inputs: Any) -> jax.Array:
    del inputs["targets"]
    source: Any = inputs.get("logits", inputs.get("hidden_states"))
    if "logits" in inputs:
        return ava_jax.distillation_loss(teacher_logits=source[..., ::-1], **inputs)[0]
    head = inputs["lm_head"][:, ::-1]
    teacher = {"teacher_hidden_states": source, "teacher_lm_head": head}
    return ava_jax.distillation_loss(**teacher, **inputs)[0]


def value_of(loss_fn: ava_jax.UnifiedLoss, **inputs: Any) -> jax.Array:
    return loss_fn(loss_fn.init(), **inputs)[0]


Entry = tuple[Callable[..., Any], dict[str, Any]]
ENTRIES: dict[str, Entry] = {
    f"{name}, {path}": (function, source)
    for name, function in {
        "unified loss": functools.partial(value_of, LOSS),
        "token_log_probs": log_probs,
        "distillation_loss": distilled,
    }.items()
    for path, source in {"hidden states": FUSED, "logits": GIVEN}.items()
}


def gradient_of(entry: Entry) -> Callable[..., Any]:
    function, _ = entry
    return jax.value_and_grad(lambda source: function(**TOKENS, **source))


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Records every program that is compiled."""
    events: list[str] = []

    def record(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(record)
    yield events
    jax.monitoring.unregister_event_duration_listener(record)


# Its arrays pass as those of the annotations.
NUMPY: Any = np

# Arrays of calls outside of jit, of functions with a loop of their own.
ids = NUMPY.array([[9, 1, 2, 1, 2, 1]])
ALONE: dict[str, Callable[[], Any]] = {
    "everything on": lambda: value_of(ALL, **BATCH),
    "a bias": lambda: value_of(
        LOSS, **TOKENS, **FUSED, lm_head_bias=NUMPY.zeros(V, np.float32)
    ),
    "layer_norm": lambda: losses.layer_norm(
        FUSED["hidden_states"], *NUMPY.ones((2, D))
    ),
    "route": lambda: losses.route(
        NUMPY.zeros((4, E), np.float32), NUMPY.zeros(E, np.float32), 1
    ),
    "load_balancing_loss": lambda: losses.load_balancing_loss(
        NUMPY.zeros((4, E), np.float32), NUMPY.zeros((4, 1), np.int32)
    ),
    "checked": lambda: ava_jax.checked(LOSS)(LOSS.init(), **TOKENS, **GIVEN)[0],
    "normalizers": lambda: ALL.normalizers(**TOKENS),
    "longest_loop": lambda: metrics.longest_loop(ids, max_period=4),
    "calibration_bins": lambda: metrics.calibration_bins(
        NUMPY.array([0.25, 0.75]), NUMPY.array([False, True]), num_bins=2
    ),
    "repeated_ngrams": lambda: metrics.repeated_ngrams(ids, ngram_size=2),
    "distinct_ngrams": lambda: metrics.distinct_ngrams(ids, ngram_size=2),
    "expert_diversity_loss": lambda: losses.expert_diversity_loss(
        NUMPY.ones((E, 4, D), np.float32), similarity="l2"
    ),
    "contrastive_margin_loss": lambda: losses.contrastive_margin_loss(
        NUMPY.eye(4, dtype=np.float32), labels=NUMPY.array([0, 0, 1, 1])
    ),
    "contrastive_triplet_loss": lambda: losses.contrastive_triplet_loss(
        NUMPY.eye(4, dtype=np.float32), labels=NUMPY.array([0, 0, 1, 1])
    ),
    "cutoff_histogram": lambda: losses.cutoff_histogram(
        NUMPY.ones((4, E), np.float32), NUMPY.zeros(E, np.float32), 1
    ),
    "sequence_unlikelihood": lambda: losses.sequence_unlikelihood(
        NUMPY.zeros((1, 6, V), np.float32), ids, ngram_size=2
    ),
    "contrastive_token_loss": lambda: losses.contrastive_token_loss(
        NUMPY.zeros((1, 6, V), np.float32), ids
    ),
    "repetition_decay_loss": lambda: losses.repetition_decay_loss(
        NUMPY.zeros((1, 6, V), np.float32), ids, span_length=2
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_second_call_outside_of_jit_compiles_nothing(
    name: str, compilations: list[str]
) -> None:
    call, source = gradient_of(ENTRIES[name]), ENTRIES[name][1]
    jax.block_until_ready(call(source))
    compilations.clear()
    jax.block_until_ready(call(source))
    assert not compilations


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", ALONE)
def test_a_second_call_of_a_function_alone_compiles_nothing(
    name: str, compilations: list[str]
) -> None:
    jax.block_until_ready(ALONE[name]())
    compilations.clear()
    jax.block_until_ready(ALONE[name]())
    assert not compilations


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", ENTRIES)
def test_numpy_arrays_are_read_as_jax_arrays(name: str) -> None:
    function, source = ENTRIES[name]
    want = function(**TOKENS, **source)
    tokens, source = jax.tree.map(np.asarray, (TOKENS, source))
    np.testing.assert_array_equal(function(**tokens, **source), want)
    # As constants of a program as well, in more than one chunk.
    inside = jax.jit(lambda: function(**tokens, **source))()
    np.testing.assert_allclose(inside, want, rtol=1e-6)


@pytest.mark.usefixtures("unannotated")
def test_numpy_arrays_of_many_chunks_and_of_a_checked_loss() -> None:
    tokens, source = jax.tree.map(np.asarray, (TOKENS, FUSED))
    small = ava_jax.create_unified_loss(vocab_size=V, chunk_size=2, block_size=2)
    want = value_of(LOSS, **TOKENS, **FUSED)
    for loss_fn in (small, ava_jax.checked(LOSS)):
        got, _, _ = loss_fn(LOSS.init(), **tokens, **source)
        np.testing.assert_allclose(got, want, rtol=1e-6)
    assert S > 2


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", [*ENTRIES, *ALONE])
def test_ranks_need_no_promotion(name: str) -> None:
    with jax.numpy_rank_promotion("raise"):
        if name in ENTRIES:
            jax.eval_shape(gradient_of(ENTRIES[name]), ENTRIES[name][1])
        elif name != "checked":  # without jit it checks values at once
            jax.eval_shape(ALONE[name])


@pytest.mark.parametrize("head", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("source", [jnp.bfloat16, jnp.float32])
def test_a_float8_head_counts_as_the_wider_dtype(head: Any, source: Any) -> None:
    hidden, short = FUSED["hidden_states"].astype(source), FUSED["lm_head"].astype(head)

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return value_of(LOSS, **TOKENS, hidden_states=hidden, lm_head=head)

    got = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (of_hidden, of_head) = got(hidden, short)
    want, (want_hidden, want_head) = got(hidden, short.astype(source))
    assert (of_hidden.dtype, of_head.dtype) == (source, head)
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(of_hidden, want_hidden)
    np.testing.assert_array_equal(of_head, want_head.astype(head))


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", ["temperature", "beta"])
def test_a_traced_number_of_a_divergence_is_refused_by_name(name: str) -> None:
    def loss(value: jax.Array) -> jax.Array:
        return distilled(**TOKENS, **GIVEN, **{name: value})

    with pytest.raises(TypeError, match=f"^{name} must be a Python number"):
        jax.eval_shape(loss, jnp.ones(()))


SIZES: dict[str, Any] = {"chunk_size": 4, "block_size": 4}
SIZED = ava_jax.create_unified_loss(vocab_size=V, **SIZES)


def sized(name: str, **inputs: Any) -> jax.Array:
    if name == "unified loss":
        return value_of(SIZED, **inputs)
    sizes = {"block_size": 4} if "logits" in inputs else SIZES
    function = log_probs if name == "token_log_probs" else distilled
    return function(**inputs, **sizes)


def exported(function: Callable[..., Any], arrays: Any) -> jax.export.Exported:
    """Exports a program for any number of rows."""
    (rows,) = jax.export.symbolic_shape("rows")

    def symbolic(x: jax.Array) -> jax.ShapeDtypeStruct:
        shape = (rows, *x.shape[1:]) if x.ndim > 1 and x.shape[0] == 4 else x.shape
        return jax.ShapeDtypeStruct(shape, x.dtype)

    return jax.export.export(jax.jit(function))(jax.tree.map(symbolic, arrays))


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize("name", ENTRIES)
def test_programs_of_any_number_of_rows_are_exported(name: str) -> None:
    function, source = ENTRIES[name]
    call = functools.partial(sized, name.split(",")[0])
    arrays = {**TOKENS, **source}
    program = exported(lambda arrays: call(**arrays), arrays)
    fewer = {k: x if k == "lm_head" else x[:3] for k, x in arrays.items()}
    for batch in (arrays, fewer):
        np.testing.assert_allclose(program.call(batch), function(**batch), rtol=1e-5)
    if "hidden" in name:
        with pytest.raises(ValueError, match=r"pass chunk_size, .* and block_size"):
            exported(lambda arrays: function(**arrays), arrays)


@pytest.mark.parametrize("types", jax.sharding.AxisType)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_loss_with_a_mesh_is_pickled_and_copied(copied: Any, types: Any) -> None:
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(types, types))
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, mesh=mesh, batch_axes="data", vocab_axis="model"
    )
    assert copied(loss_fn) == loss_fn


def test_a_pickled_loss_names_devices_that_do_not_exist() -> None:
    mesh = jax.make_mesh((2,), ("data",))
    layout = ava_jax.create_unified_loss(
        vocab_size=V, mesh=mesh, batch_axes="data"
    ).layout
    assert layout is not None
    rebuild, (platform, ids, *rest) = layout.__reduce__()
    with pytest.raises(ValueError, match="which do not exist here"):
        rebuild(platform, ids + 1000, *rest)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_gradients_from_hidden_states_are_exported(platform: str) -> None:
    call = gradient_of(ENTRIES["unified loss, hidden states"])
    check = jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")
    export = jax.export.export(
        jax.jit(call), platforms=(platform,), disabled_checks=[check]
    )
    assert export(FUSED).platforms == (platform,)

"""A batch without rows or tokens has a loss of 0, as one whose tokens are masked."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from jax.sharding import Mesh
from support.trees import assert_trees_close

import ava_jax
from ava_jax import losses

D, V, K, E = 4, 11, 2, 3
SHAPES = [(0, 4), (2, 0)]
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"eos_token_id": 0},
    "targets": {"eos_token_id": 0, "penalty_source": "targets"},
    "sequential": {
        "use_mtp": True,
        "mtp_type": "sequential",
        "z_loss_weight": 1e-4,
        "unlikelihood_weight": 0.1,
        "contrastive_token_weight": 0.1,
        "use_focal_loss": True,
    },
    "parallel": {"use_mtp": True},
    "adaptive": {"primary_loss_type": "adaptive_mtp"},
    "experts": {
        "use_moe_balancing": True,
        "use_auxiliary_loss": True,
        "use_diversity_loss": True,
    },
    "bias": {"use_moe_balancing": True, "moe_balancing_type": "bias"},
    "quantile": {"use_moe_balancing": True, "moe_balancing_type": "quantile"},
    "infonce": {"use_contrastive_loss": True},
    "simctg": {"use_contrastive_loss": True, "contrastive_type": "simctg"},
}
COMMON = {"vocab_size": V, "hidden_size": D, "num_future_tokens": K, "num_experts": E}
MESH = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("data", "time", "vocab"))
ON_MESH: dict[str, Any] = {
    "mesh": MESH,
    "batch_axes": "data",
    "sequence_axis": "time",
    "vocab_axis": "vocab",
}


def inputs_of(batch: int, length: int, *, path: str) -> Any:
    """Returns arguments for every config, of random values where there are any."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    inputs = {
        "targets": np.ones((batch, length), np.int32),
        "hidden_states": normal(batch, length, D),
        "lm_head": normal(D, V),
        "mtp_hidden_states": normal(K, batch, length, D),
        "mtp_params": {
            "norm": {"scale": normal(D), "bias": normal(D)},
            "heads": {"kernel": normal(K, D, V), "bias": normal(K, V)},
        },
        "additional_logits": normal(K, batch, length, V),
        "confidence_scores": np.full((batch, 1), 0.7, np.float32),
        "gate_logits": normal(batch, length, E),
        "expert_indices": np.zeros((batch, length, 1), np.int32),
        "expert_outputs": normal(E, batch, length, D),
        "embeddings": normal(batch, D),
    }
    if path == "logits":
        inputs["logits"] = normal(batch, length, V)
    return jax.device_put(inputs)


def loss_of(name: str, **options: Any) -> ava_jax.UnifiedLoss:
    return ava_jax.create_unified_loss(COMMON | CONFIGS[name], **options)


def call(loss_fn: ava_jax.UnifiedLoss, inputs: Any):
    """Returns loss, aux, the state after it, and the gradients of what is floating."""
    # With logits, only sequential heads need the projection.
    if "logits" in inputs and "mtp_hidden_states" not in loss_fn.select(inputs):
        inputs = {k: v for k, v in inputs.items() if k != "lm_head"}
    inputs = dict(loss_fn.select(inputs))
    floats = {k: v for k, v in inputs.items() if k not in ("targets", "expert_indices")}

    def objective(floats):
        loss, aux, state = loss_fn(loss_fn.init(), **(inputs | floats))
        return loss, (aux, state)

    run = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (loss, (aux, state)), gradients = run(floats)
    return loss, aux, state, gradients, floats


def assert_empty(loss_fn: ava_jax.UnifiedLoss, inputs: Any) -> None:
    loss, aux, state, gradients, floats = call(loss_fn, inputs)
    assert float(loss) == float(aux["total_loss"]) == float(aux["num_tokens"]) == 0
    assert all(np.all(np.isfinite(x)) for x in aux.values())
    assert_trees_close(state, loss_fn.init(), 0)
    assert_trees_close(gradients, jax.tree.map(np.zeros_like, floats), 0)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_zero(shape: tuple[int, int], name: str) -> None:
    path = "logits" if name == "adaptive" else "hidden"
    assert_empty(loss_of(name), inputs_of(*shape, path=path))


@pytest.mark.parametrize("shape", [*SHAPES, (0, 0)])
def test_the_loss_of_logits_is_zero(shape: tuple[int, int]) -> None:
    assert_empty(loss_of("default"), inputs_of(*shape, path="logits"))


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_of_every_implementation_is_zero(
    shape: tuple[int, int], implementation: str, path: str
) -> None:
    loss_fn = loss_of("default", implementation=implementation)
    assert_empty(loss_fn, inputs_of(*shape, path=path))


@pytest.mark.parametrize("path", ["hidden", "logits"])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 0)])
def test_the_loss_on_a_mesh_is_zero(shape: tuple[int, int], path: str) -> None:
    assert_empty(loss_of("default", **ON_MESH), inputs_of(*shape, path=path))


def test_aux_is_that_of_a_batch_that_is_masked() -> None:
    loss_fn = loss_of("sequential")
    mask = {"attention_mask": np.zeros((2, 4), np.float32)}

    @jax.jit
    def aux_of(inputs):
        return loss_fn(loss_fn.init(), **loss_fn.select(inputs))[1]

    wanted = aux_of(inputs_of(2, 4, path="hidden") | mask)
    got = aux_of(inputs_of(0, 4, path="hidden"))
    assert_trees_close(got, wanted, 0)


def test_an_empty_micro_batch_adds_nothing() -> None:
    loss_fn = loss_of("default")
    full, empty = (inputs_of(batch, 4, path="hidden") for batch in (2, 0))
    state = loss_fn.init()
    own = jax.jit(loss_fn.normalizers)(targets=full["targets"])

    def accumulate(inputs):
        chosen = loss_fn.select(inputs)
        return loss_fn.accumulate(state, normalizers=own, **chosen)

    (loss, _, stats), (more, _, none) = map(jax.jit(accumulate), (full, empty))
    both = jax.tree.map(np.add, stats, none)
    assert float(loss) > 1
    assert float(more) == 0
    summary = jax.jit(loss_fn.summary)
    assert_trees_close(summary(state, both), summary(state, stats), 1e-6)


def test_a_checked_loss_is_zero() -> None:
    loss_fn = loss_of("bias")
    inputs = loss_fn.select(inputs_of(0, 4, path="hidden"))
    run = jax.jit(checkify.checkify(ava_jax.checked(loss_fn)))
    error, (loss, _, _) = run(loss_fn.init(), **inputs)
    error.throw()
    assert float(loss) == 0


@pytest.mark.parametrize("options", [{}, ON_MESH], ids=["", "mesh"])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_probs_of_no_tokens_have_no_values(
    shape: tuple[int, int], options: dict[str, Any]
) -> None:
    inputs = inputs_of(*shape, path="hidden")

    def total(hidden, head):
        out = ava_jax.token_log_probs(
            targets=inputs["targets"], hidden_states=hidden, lm_head=head, **options
        )
        assert out.log_probs.shape == out.entropy.shape == out.log_z.shape == shape
        return jnp.sum(out.log_probs) + jnp.sum(out.entropy)

    hidden, head = inputs["hidden_states"], inputs["lm_head"]
    value, gradients = jax.jit(jax.value_and_grad(total, (0, 1)))(hidden, head)
    assert float(value) == 0
    assert_trees_close(gradients, (0 * np.asarray(hidden), 0 * np.asarray(head)), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_distillation_of_no_tokens_is_zero(shape: tuple[int, int]) -> None:
    inputs = inputs_of(*shape, path="hidden")
    student = {k: inputs[k] for k in ("hidden_states", "lm_head")}

    def loss(student):
        return ava_jax.distillation_loss(
            **student,
            teacher_hidden_states=inputs["hidden_states"],
            teacher_lm_head=inputs["lm_head"],
        )[0]

    value, gradients = jax.jit(jax.value_and_grad(loss))(student)
    assert float(value) == 0
    assert_trees_close(gradients, jax.tree.map(np.zeros_like, student), 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_losses_of_no_logits_are_zero(shape: tuple[int, int]) -> None:
    logits, ids = (
        np.zeros((*shape, V), np.float32),
        jax.device_put(np.zeros(shape, np.int32)),
    )

    @jax.jit
    def all_losses(logits):
        return (
            losses.focal_loss(logits, ids),
            losses.label_smoothing_loss(logits, ids),
            losses.contrastive_token_loss(logits, ids),
            losses.sequence_unlikelihood(logits, ids),
            losses.anti_repetition_loss(logits, ids)[0],
            jnp.log(losses.perplexity(logits, ids)),
        )

    assert all(np.sum(value) == 0 for value in all_losses(logits))

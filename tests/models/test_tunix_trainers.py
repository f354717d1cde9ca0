"""Tunix's trainers as their authors run them: only the loss is swapped, by their hooks.

In each test the trainer runs twice, once with its own loss and once with ours from
hidden states, and every loss, every metric and every parameter is compared.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from numpy.typing import NDArray
from support.model_checks import EVERYTHING, PLAIN, REASON, TUNIX_WARNINGS, D, V
from support.tunix_checks import (
    PAD,
    STEPS,
    B,
    C,
    P,
    Run,
    check_same,
    differences,
    fused_of,
    hidden_of,
    make,
    masks_of,
    optimizer,
    run_of,
)

import ava_jax
from ava_jax import losses
from ava_jax.heads import MTPHeads, NNXHeads

peft = pytest.importorskip("tunix.sft.peft_trainer", reason=REASON)
dpo = pytest.importorskip("tunix.sft.dpo.dpo_trainer", reason=REASON)

pytestmark = TUNIX_WARNINGS

Loss = Callable[..., Any]


# Supervised fine-tuning ----------------------------------------------------------


def texts() -> list[Any]:
    """Rows of a prompt, from which nothing is learnt, text, and padding."""
    rng, made = np.random.default_rng(0), []
    for _ in range(STEPS):
        ids = rng.integers(3, V, (B, P + C))
        lengths = rng.integers(P + 2, P + C + 1, (B, 1))
        ids = np.where(np.arange(P + C) < lengths, ids, PAD)
        learnt = (ids != PAD) & (np.arange(P + C) >= P - 2)
        made.append(peft.TrainingInput(input_tokens=ids, input_mask=learnt))
    return made


def inputs_of(batch: Any) -> dict[str, jax.Array]:
    positions, attention = masks_of(batch.input_tokens != PAD)
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": positions,
        "attention_mask": attention,
    }


def training_config(**options: Any) -> Any:
    return peft.TrainingConfig(eval_every_n_steps=1000, max_steps=STEPS, **options)


def fine_tune(model: Any, loss: Loss | None = None, **options: Any) -> Run:
    trainer = peft.PeftTrainer(model, optimizer(), training_config(**options))
    trainer.with_gen_model_input_fn(inputs_of)
    if loss is not None:
        trainer.with_loss_fn(loss, has_aux=True)
    trainer.train(texts())
    return run_of(trainer)


class LossVariable(nnx.Variable):
    """The loss's state as a part of the model, which no optimizer touches."""


def sft_loss(loss_fn: Any) -> Loss:
    def loss(
        model: Any,
        input_tokens: jax.Array,
        input_mask: jax.Array,
        positions: jax.Array,
        attention_mask: jax.Array,
    ) -> Any:
        hidden = hidden_of(model, input_tokens, positions, attention_mask)[:, :-1]
        mtp = {"mtp_params": model.mtp.params} if hasattr(model, "mtp") else {}
        value, aux, state = loss_fn(
            model.loss_state.get_value(),
            targets=input_tokens[:, 1:],
            attention_mask=input_mask[:, 1:],
            hidden_states=hidden,
            lm_head=model.lm_head.w[...],
            **mtp,
        )
        model.loss_state.set_value(state)
        return value, aux

    return loss


def test_sft() -> None:
    theirs = fine_tune(make())
    loss_fn = ava_jax.create_unified_loss(PLAIN)
    model = make()
    model.loss_state = LossVariable(loss_fn.init())
    own = fine_tune(model, sft_loss(loss_fn))
    check_same(own, theirs)
    assert int(model.loss_state.get_value().step) == STEPS


def with_heads(loss_fn: Any) -> Any:
    """The model with heads and the loss's state as layers."""
    model, width = make(), jax.ShapeDtypeStruct((1, 1, D), jnp.float32)
    model.mtp = NNXHeads(MTPHeads(2, V), width, rngs=nnx.Rngs(3))
    model.loss_state = LossVariable(loss_fn.init())
    return model


def test_sft_with_every_term_and_heads_as_a_layer(tmp_path: Path) -> None:
    """State and heads are in the model, and so in the trainer's checkpoints."""
    loss_fn = ava_jax.create_unified_loss(EVERYTHING, use_contrastive_loss=False)
    model = with_heads(loss_fn)
    before = model.mtp.params
    options: Any = {"checkpoint_root_directory": str(tmp_path)}
    own = fine_tune(model, sft_loss(loss_fn), **options)
    state = model.loss_state.get_value()
    assert int(state.step) == int(state.loss_history.size) == STEPS
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), before, model.mtp.params)
    assert min(jax.tree.leaves(moved)) > 1e-4
    plain = fine_tune(make()).history["loss"]
    assert abs(own.history["loss"] / plain - 1).min() > 1e-2

    resumed = with_heads(loss_fn)
    peft.PeftTrainer(resumed, optimizer(), training_config(**options))
    chex.assert_trees_all_equal(resumed.loss_state.get_value(), state)
    chex.assert_trees_all_equal(resumed.mtp.params, model.mtp.params)


# Preferences ---------------------------------------------------------------------


def pairs() -> list[Any]:
    """Prompts, padded on the left, and two answers to each, padded on the right."""
    rng, made = np.random.default_rng(1), []

    def padded(width: int, least: int, left: bool) -> tuple[NDArray, NDArray]:
        lengths = rng.integers(least, width + 1, (B // 2, 1))
        index = np.arange(width)[::-1] if left else np.arange(width)
        mask = index < lengths
        return np.where(mask, rng.integers(3, V, mask.shape), PAD), mask

    for _ in range(STEPS):
        arrays = padded(P, 2, True) + padded(C, 3, False) + padded(C, 3, False)
        made.append(dpo.TrainingInput(*map(jnp.asarray, arrays)))
    return made


REWARDS = {
    "rewards/chosen": "chosen_rewards",
    "rewards/rejected": "rejected_rewards",
    "rewards/margin": "margin",
    "rewards/accuracy": "accuracy",
}


def preference_loss(of_pairs: Callable[..., Any]) -> Loss:
    """The mean of a loss of pairs, and what the trainer logs."""

    def loss(model: Any, train_example: Any) -> Any:
        ids, mask = train_example.input_ids, train_example.completion_mask
        attended = jnp.concatenate([ids[:, :-C] != PAD, mask], axis=1)
        fused = fused_of(model, ids, attended, C)
        token = ava_jax.token_log_probs(**fused, attention_mask=mask).log_probs
        chosen, rejected = jnp.split(losses.sequence_log_probs(token, mask), 2)
        value, aux = of_pairs(train_example, chosen, rejected)
        logged = {name: jnp.mean(aux[own]) for name, own in REWARDS.items()}
        logged["log_probs/chosen"] = jnp.mean(chosen)
        logged["log_probs/rejected"] = jnp.mean(rejected)
        return jnp.mean(value), logged | {"odds_ratio": jnp.ones(())}

    return loss


def prefer(of_pairs: Callable[..., Any] | None = None, **options: Any) -> Run:
    config = dpo.DPOTrainingConfig(eval_every_n_steps=1000, max_steps=STEPS, **options)
    reference = make(seed=5) if config.algorithm == "dpo" else None
    trainer = dpo.DPOTrainer(make(), reference, optimizer(), config)
    if of_pairs is not None:
        trainer.with_gen_model_input_fn(lambda x: {"train_example": x})
        trainer.with_loss_fn(preference_loss(of_pairs), has_aux=True)
    trainer.train(pairs())
    return run_of(trainer, metrics=(*REWARDS, "log_probs/chosen"))


def dpo_of(**options: Any) -> Callable[..., Any]:
    """Our loss of the trainer's example, with the reference's log-probabilities."""

    def of_pairs(example: Any, chosen: jax.Array, rejected: jax.Array) -> Any:
        ref = example.ref_chosen_logps, example.ref_rejected_logps
        return losses.dpo_loss(chosen, rejected, *ref, **options)

    return of_pairs


def test_dpo() -> None:
    check_same(prefer(dpo_of(beta=0.2)), prefer(beta=0.2))


def test_dpo_with_label_smoothing() -> None:
    """Theirs is cDPO, CPO's loss of the ratios; `kind="robust"` is another."""

    def smoothed(example: Any, chosen: jax.Array, rejected: jax.Array) -> Any:
        ratio = chosen - example.ref_chosen_logps
        other = rejected - example.ref_rejected_logps
        return losses.cpo_loss(ratio, other, beta=0.2, label_smoothing=0.1)

    theirs = prefer(beta=0.2, label_smoothing=0.1)
    check_same(prefer(smoothed), theirs)
    robust = prefer(dpo_of(beta=0.2, kind="robust", label_smoothing=0.1))
    assert differences(robust, theirs)[0] > 1e-2


def test_orpo() -> None:
    """Theirs has the odds of whole rows; the method's are those of a row's mean."""

    def of_sums(example: Any, chosen: jax.Array, rejected: jax.Array) -> Any:
        length, _ = jnp.split(jnp.sum(example.completion_mask, -1), 2)
        value, aux = losses.orpo_loss(chosen, rejected, beta=0.3)
        return value - chosen / length, aux

    def of_means(example: Any, chosen: jax.Array, rejected: jax.Array) -> Any:
        lengths = jnp.split(jnp.sum(example.completion_mask, -1), 2)
        chosen, rejected = chosen / lengths[0], rejected / lengths[1]
        value, aux = losses.orpo_loss(chosen, rejected, beta=0.3)
        return value - chosen, aux

    theirs = prefer(algorithm="orpo", lambda_orpo=0.3)
    check_same(prefer(of_sums, algorithm="orpo"), theirs)
    assert differences(prefer(of_means, algorithm="orpo"), theirs)[0] > 1e-2

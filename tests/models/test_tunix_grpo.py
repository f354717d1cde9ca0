"""Tunix's GRPO learner as its authors run it: only the policy's loss is swapped.

It samples with its own engine, computes rewards and advantages, and updates twice a
batch. It runs with its own loss and with ours, found by name in its registry.
"""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.model_checks import REASON, TUNIX_WARNINGS, V
from support.tunix_checks import (
    PAD,
    STEPS,
    C,
    P,
    Run,
    check_same,
    differences,
    fused_of,
    make,
    optimizer,
    run_of,
)

import ava_jax
from ava_jax import losses, terms

grpo = pytest.importorskip("tunix.rl.grpo.grpo_learner", reason=REASON)
clusters = pytest.importorskip("tunix.rl.rl_cluster", reason=REASON)
registry = pytest.importorskip("tunix.rl.function_registry", reason=REASON)
rollouts = pytest.importorskip("tunix.rl.rollout.base_rollout", reason=REASON)

pytestmark = TUNIX_WARNINGS

BOS, EOS = 1, 2


class Letters:
    """A tokenizer of single characters."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [3 + ord(letter) % (V - 3) for letter in text]

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        return " ".join(str(int(i)) for i in ids)

    def pad_id(self) -> int:
        return PAD

    def bos_id(self) -> int:
        return BOS

    def eos_id(self) -> int:
        return EOS


def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The share of even ids."""
    ids = [[int(i) for i in text.split()] for text in completions]
    return [float(np.mean([i % 2 == 0 for i in row])) for row in ids]


@functools.cache
def reinforce(name: str, **options: Any) -> Run:
    """Runs the learner: it samples, rewards, and updates the policy twice a batch."""
    devices = np.asarray(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ("fsdp", "tp"))
    roles = clusters.Role
    training = clusters.RLTrainingConfig(
        actor_optimizer=optimizer(),
        eval_every_n_steps=1000,
        max_steps=2 * STEPS,
        mini_batch_size=2,
        train_micro_batch_size=2,
    )
    rollout = rollouts.RolloutConfig(
        max_tokens_to_generate=C,
        max_prompt_length=P,
        kv_cache_size=P + C + 3,
        temperature=1.0,
        top_p=1.0,
        seed=0,
        eos_tokens=list(range(EOS, 16)),
    )
    config = clusters.ClusterConfig(
        role_to_mesh=dict.fromkeys((roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh),
        rollout_engine="vanilla",
        training_config=training,
        rollout_config=rollout,
    )
    cluster = clusters.RLCluster(
        actor=make(), reference=make(5), tokenizer=Letters(), cluster_config=config
    )
    algorithm = grpo.GRPOConfig(
        policy_loss_fn=name, num_generations=3, num_iterations=2, **options
    )
    learner = grpo.GRPOLearner(cluster, algorithm, reward_fns=reward)
    prompts = [{"prompts": np.array([f"a{i}", f"bc{i}"])} for i in range(STEPS)]
    learner.train(prompts)
    return run_of(cluster.actor_trainer, "actor", ("kl", "pg_clipfrac"))


def grpo_arguments(model: Any, train_example: Any, pad_id: int) -> dict[str, Any]:
    """What the learner gives to a policy's loss, as arguments of ours."""
    ids = jnp.concatenate([train_example.prompt_ids, train_example.completion_ids], 1)
    mask = train_example.completion_mask
    return fused_of(model, ids, ids != pad_id, C) | {"attention_mask": mask}


def grpo_options(algo_config: Any) -> dict[str, Any]:
    """The learner's settings, under our names."""
    estimators = {"mse_kl": "k2", "low_var_kl": "k3"}
    return {
        "kind": "grpo",
        "clip_low": algo_config.epsilon,
        "clip_high": algo_config.epsilon,
        "kl_weight": algo_config.beta,
        "kl_estimator": estimators[algo_config.kl_loss_mode],
    }


@registry.register_policy_loss_fn("ava_two_calls")
def two_calls(
    model: Any, train_example: Any, algo_config: Any, pad_id: int, eos_id: int
) -> Any:
    """Log-probabilities, and the loss of them."""
    out = ava_jax.token_log_probs(**grpo_arguments(model, train_example, pad_id))
    loss, aux = losses.policy_loss(
        out.log_probs,
        train_example.advantages,
        train_example.completion_mask,
        old_log_probs=train_example.old_per_token_logps,
        ref_log_probs=train_example.ref_per_token_logps,
        **grpo_options(algo_config),
    )
    return loss, {"kl": aux["kl"], "pg_clipfrac": aux["clip_fraction"]}


@registry.register_policy_loss_fn("ava_one_pass")
def one_pass(
    model: Any, train_example: Any, algo_config: Any, pad_id: int, eos_id: int
) -> Any:
    """The loss as a term of the pass over the vocabulary."""
    term = terms.PolicyTerm(**grpo_options(algo_config))
    loss_fn = ava_jax.compose([term], vocab_size=V)
    advantages = train_example.advantages[:, None]
    shape = train_example.completion_mask.shape
    loss, aux, _ = loss_fn(
        loss_fn.init(),
        **grpo_arguments(model, train_example, pad_id),
        extra_inputs={
            "advantages": jnp.broadcast_to(advantages, shape),
            "old_log_probs": train_example.old_per_token_logps,
            "ref_log_probs": train_example.ref_per_token_logps,
        },
    )
    return loss, {"kl": aux["policy_kl"], "pg_clipfrac": aux["clip_fraction"]}


MODES = ("mse_kl", "low_var_kl")


def settings(mode: str) -> dict[str, Any]:
    return {"beta": 0.1, "kl_loss_mode": mode, "epsilon": 0.04}


@pytest.mark.parametrize("name", ["ava_two_calls", "ava_one_pass"])
@pytest.mark.parametrize("mode", MODES)
def test_grpo(name: str, mode: str) -> None:
    """The learner, its sampler included: the same tokens, rewards and updates."""
    theirs = reinforce("grpo", **settings(mode))
    assert theirs.history["kl"].min() != theirs.history["kl"].max()
    assert 0.05 < theirs.history["pg_clipfrac"].max() < 0.9
    check_same(reinforce(name, **settings(mode)), theirs, steps=2 * STEPS)


def test_grpo_of_other_settings_is_apart() -> None:
    """Another estimator of the divergence, or another bound, is far off."""
    first, second = (reinforce("grpo", **settings(mode)) for mode in MODES)
    assert differences(second, first)[0] > 1e-2
    wide = reinforce("ava_two_calls", **settings("mse_kl") | {"epsilon": 0.2})
    assert differences(wide, first)[0] > 1e-2

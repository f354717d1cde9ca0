"""Losses of post-training: log-probabilities of generated tokens, and GRPO.

The baselines and this package's candidates are functions of the same arrays. Each
candidate of GRPO is one of two programs: `token_log_probs` and a loss of its result,
which makes the logits twice (8·N·D·V flops), or a term of the pass (6·N·D·V).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import ava_jax
from ava_jax import losses, terms
from ava_jax.kernel.platforms import Implementation as Kernel
from benchmarks.arrays import Batch, Floats
from benchmarks.candidates import plain
from benchmarks.timing import Implementation

NAIVE_LOG_PROBS = "naive log-probs"
CHECKPOINTED_LOG_PROBS = "checkpointed log-probs"
OWN_LOG_PROBS = "log-probs"
NAIVE_GRPO = "naive GRPO"
CHECKPOINTED_GRPO = "checkpointed GRPO"
TWO_PASSES = "GRPO of log-probs"
ONE_PASS = "GRPO as a term"
LOG_PROBS = NAIVE_LOG_PROBS, CHECKPOINTED_LOG_PROBS, OWN_LOG_PROBS
GRPO = NAIVE_GRPO, CHECKPOINTED_GRPO, TWO_PASSES, ONE_PASS
OWN = OWN_LOG_PROBS, TWO_PASSES, ONE_PASS
MASKS = "all unmasked", "a quarter, at row ends", "a quarter, scattered"

CHUNK = 512
CLIP = 0.2

# Targets [B, S], hidden states [B, S, D] and projection [D, V] to [B, S].
LogProbs = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Rollout(NamedTuple):
    """Generated tokens and what is known of them, arrays [B, S].

    Attributes:
      targets: ids.
      mask: 1 at unmasked tokens.
      advantages: A.
      old_log_probs: those of the policy that generated the tokens.
    """

    targets: jax.Array
    mask: jax.Array
    advantages: jax.Array
    old_log_probs: jax.Array


# Hidden states, projection and rollout to the loss.
Loss = Callable[[jax.Array, jax.Array, Rollout], jax.Array]


def make_rollout(batch: Batch, vocab: int, mask: jax.Array | None = None) -> Rollout:
    """Draws what a policy loss reads for the targets of a batch.

    The old log-probabilities are near those of random logits of variance 1, so that
    some ratios are clipped and others are not.
    """
    targets = batch.targets
    keys = jax.random.split(jax.random.key(1))
    noise = jax.random.normal(keys[0], targets.shape)
    return Rollout(
        targets,
        jnp.ones(targets.shape, jnp.int32) if mask is None else mask,
        jax.random.normal(keys[1], targets.shape),
        noise - jnp.log(jnp.float32(vocab)) - 0.5,
    )


def implementation(loss: Loss, batch: Batch, rollout: Rollout) -> Implementation:
    """Returns the jitted loss with its gradients."""

    def objective(floats: Floats, rollout: Rollout) -> jax.Array:
        return loss(floats["hidden_states"], floats["lm_head"], rollout)

    return Implementation(
        jax.jit(jax.value_and_grad(objective)), (batch.floats, rollout)
    )


# Log-probabilities ---------------------------------------------------------------


def naive_log_probs(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> jax.Array:
    """Computes all logits, and their log-softmax in float32."""
    logits = (hidden_states @ lm_head).astype(jnp.float32)
    each = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(each, targets[..., None], -1)[..., 0]


def checkpointed_log_probs(
    targets: jax.Array, hidden_states: jax.Array, lm_head: jax.Array
) -> jax.Array:
    """Computes the naive ones of 512 tokens at a time, with `jax.checkpoint`."""
    chunk = min(CHUNK, targets.size)

    @jax.checkpoint
    def step(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        return naive_log_probs(*part, lm_head)

    width = hidden_states.shape[-1]
    parts = targets.reshape(-1, chunk), hidden_states.reshape(-1, chunk, width)
    return lax.map(step, parts).reshape(targets.shape)


def own_log_probs(
    targets: jax.Array,
    hidden_states: jax.Array,
    lm_head: jax.Array,
    *,
    implementation: Kernel | None = None,
) -> jax.Array:
    """Computes this package's log-probabilities."""
    return ava_jax.token_log_probs(
        targets=targets,
        hidden_states=hidden_states,
        lm_head=lm_head,
        implementation=implementation,
    ).log_probs


def weighted(log_probs: LogProbs) -> Loss:
    """Returns minus the mean of the log-probabilities times the advantages."""

    def loss(
        hidden_states: jax.Array, lm_head: jax.Array, rollout: Rollout
    ) -> jax.Array:
        each = log_probs(rollout.targets, hidden_states, lm_head)
        return -jnp.mean(rollout.advantages * each)

    return loss


# GRPO ----------------------------------------------------------------------------


def grpo(log_probs: LogProbs) -> Loss:
    """Returns the loss of GRPO, written out, of a baseline's log-probabilities."""

    def loss(
        hidden_states: jax.Array, lm_head: jax.Array, rollout: Rollout
    ) -> jax.Array:
        each = log_probs(rollout.targets, hidden_states, lm_head)
        ratio = jnp.exp(each - rollout.old_log_probs)
        clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
        each = jnp.minimum(ratio * rollout.advantages, clipped * rollout.advantages)
        mask = rollout.mask.astype(jnp.float32)
        rows = jnp.sum(mask * each, -1) / jnp.maximum(jnp.sum(mask, -1), 1)
        return -jnp.mean(rows)

    return loss


def two_passes(
    hidden_states: jax.Array,
    lm_head: jax.Array,
    rollout: Rollout,
    *,
    implementation: Kernel | None = None,
) -> jax.Array:
    """Computes GRPO of `token_log_probs`, whose gradient makes the logits again."""
    out = ava_jax.token_log_probs(
        targets=rollout.targets,
        hidden_states=hidden_states,
        lm_head=lm_head,
        attention_mask=rollout.mask,
        implementation=implementation,
    )
    return losses.policy_loss(
        out.log_probs,
        rollout.advantages,
        rollout.mask,
        kind="grpo",
        old_log_probs=rollout.old_log_probs,
    )[0]


def one_pass(
    hidden_states: jax.Array,
    lm_head: jax.Array,
    rollout: Rollout,
    *,
    implementation: Kernel | None = None,
) -> jax.Array:
    """Computes GRPO as a term of the pass."""
    loss_fn = ava_jax.compose(
        [terms.PolicyTerm("grpo")],
        vocab_size=lm_head.shape[-1],
        implementation=implementation,
    )
    loss, _, _ = loss_fn(
        loss_fn.init(),
        targets=rollout.targets,
        hidden_states=hidden_states,
        lm_head=lm_head,
        attention_mask=rollout.mask,
        extra_inputs={
            "advantages": rollout.advantages,
            "old_log_probs": rollout.old_log_probs,
        },
    )
    return loss


# Masks ---------------------------------------------------------------------------


def masks(batch: int, length: int) -> dict[str, jax.Array]:
    """Returns masks [B, S] by name: of all tokens, and of a quarter of them."""
    position = jnp.arange(length)
    at_end = position >= length - length // 4
    keys = jax.random.split(jax.random.key(2), batch)
    scattered = [jax.random.permutation(key, at_end) for key in keys]
    rows = (
        jnp.ones((batch, length), bool),
        jnp.broadcast_to(at_end, (batch, length)),
        jnp.stack(scattered),
    )
    return {
        name: mask.astype(jnp.int32) for name, mask in zip(MASKS, rows, strict=True)
    }


def masked_loss(
    hidden_states: jax.Array, lm_head: jax.Array, rollout: Rollout
) -> jax.Array:
    """Computes this package's cross-entropy of the unmasked tokens."""
    loss_fn = ava_jax.unified_loss(plain(lm_head.shape[-1]))
    return loss_fn(
        loss_fn.init(),
        targets=rollout.targets,
        hidden_states=hidden_states,
        lm_head=lm_head,
        attention_mask=rollout.mask,
    )[0]


LOSSES: dict[str, Loss] = {
    NAIVE_LOG_PROBS: weighted(naive_log_probs),
    CHECKPOINTED_LOG_PROBS: weighted(checkpointed_log_probs),
    OWN_LOG_PROBS: weighted(own_log_probs),
    NAIVE_GRPO: grpo(naive_log_probs),
    CHECKPOINTED_GRPO: grpo(checkpointed_log_probs),
    TWO_PASSES: two_passes,
    ONE_PASS: one_pass,
}


def by_xla() -> dict[str, Loss]:
    """Returns this package's losses without its kernel for GPUs."""
    without_kernel = functools.partial(own_log_probs, implementation="xla")
    return {
        OWN_LOG_PROBS: weighted(without_kernel),
        TWO_PASSES: functools.partial(two_passes, implementation="xla"),
        ONE_PASS: functools.partial(one_pass, implementation="xla"),
    }

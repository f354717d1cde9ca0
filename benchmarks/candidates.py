"""This package's losses that are measured, through its public API."""

import dataclasses

import jax

import ava_jax
from ava_jax.inputs import LossInputs
from benchmarks.arrays import Batch
from benchmarks.baselines import MTP_WEIGHT
from benchmarks.timing import Implementation


def plain(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Returns the config of the cross-entropy alone."""
    return ava_jax.UnifiedLossConfig(
        vocab_size=vocab,
        primary_loss_type="standard",
        label_smoothing=0.0,
        use_ngram_penalty=False,
        use_immediate_repetition_penalty=False,
    )


def repetition(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Returns plain with n-gram, token diversity and immediate repetition penalties."""
    return dataclasses.replace(
        plain(vocab), use_ngram_penalty=True, use_immediate_repetition_penalty=True
    )


def unlikelihood(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Returns plain with token unlikelihood."""
    return dataclasses.replace(plain(vocab), unlikelihood_weight=1.0)


def everything(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Returns the config with every repetition and EOS penalty.

    It has label smoothing, the z-loss and adaptive temperature as well.
    """
    return ava_jax.UnifiedLossConfig(
        vocab_size=vocab, label_smoothing=0.1, z_loss_weight=1e-4, eos_token_id=2
    )


def with_depths(
    config: ava_jax.UnifiedLossConfig, depths: int
) -> ava_jax.UnifiedLossConfig:
    """Returns the config with K sequential depths on the main head."""
    return dataclasses.replace(
        config,
        use_mtp=True,
        mtp_type="sequential",
        num_future_tokens=depths,
        mtp_weight=MTP_WEIGHT,
    )


def candidate(
    config: ava_jax.UnifiedLossConfig,
    batch: Batch,
    *,
    gradient: bool = True,
    report: bool = False,
) -> Implementation:
    """Returns the jitted loss of a config.

    Args:
      config: the loss configuration.
      batch: its inputs.
      gradient: whether to compute the gradients of the batch's floats too.
      report: whether `aux` and the new state are outputs as well.
    """
    loss_fn = ava_jax.unified_loss(config)

    def objective(
        floats: LossInputs, targets: jax.Array, state: ava_jax.LossState
    ) -> tuple[jax.Array, object]:
        inputs: LossInputs = {**floats, "targets": targets}
        loss, aux, after = loss_fn(state, **inputs)
        return loss, (aux, after) if report else ()

    called = jax.value_and_grad(objective, has_aux=True) if gradient else objective
    return Implementation(jax.jit(called), (*batch, loss_fn.init()))

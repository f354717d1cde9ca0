"""The loss in MaxText 0.2.5: call `use`, then its trainer with num_vocab_tiling=2."""

import jax
from flax import nnx
from maxtext.models.models import Transformer
from maxtext.trainers.pre_train import train
from maxtext.utils.sharding import create_sharding

import ava_jax

AXES = ("activation_embed_and_logits_batch", "activation_length", "activation_vocab")


def create(options, config, **layout) -> ava_jax.UnifiedLoss:
    """Returns the loss with these options; the rest is from MaxText's config."""
    cap = (config.logits_via_embedding and config.final_logits_soft_cap) or None
    own = {"vocab_size": config.vocab_size, "z_loss_weight": config.z_loss_multiplier}
    own |= {"logit_soft_cap": cap, "precision": config.matmul_precision}
    return ava_jax.create_unified_loss(**own, **options, **layout)


def loss(options, model, hidden, data, config, is_train) -> tuple[jax.Array, jax.Array]:
    """Computes the sums of the loss and the z-loss, as `vocab_tiling_nnx_loss` does."""
    # Without the barrier, XLA keeps the operands of the norm's gradient until the end.
    norm, scale = nnx.split(model.decoder.decoder_norm)
    hidden, scale = jax.lax.optimization_barrier((hidden, scale))
    segments = data["targets_segmentation"]
    x = nnx.merge(norm, scale)(jax.numpy.where(segments[..., None], hidden, 0))
    x = model.decoder.dropout(x, deterministic=not (config.enable_dropout and is_train))
    if config.logits_via_embedding:
        x = x / x.shape[-1] ** 0.5 if config.normalize_embedding_logits else x
        head = model.token_embedder.embedding[...].astype("bfloat16").T
    else:
        dense = model.decoder.logits_dense
        if dense.kernel_scale is not None:
            raise ValueError("logits_dense is fp8: put it in unquantized_modules")
        x, head = x.astype(dense.dtype), dense.kernel[...].astype(dense.dtype)
    rows, tokens, ids = create_sharding(model.mesh, AXES).spec
    if tokens and config.context_parallel_load_balance:
        raise ValueError("rows are reordered: set context_parallel_load_balance=false")
    axes = {"batch_axes": rows or (), "sequence_axis": tokens, "vocab_axis": ids}
    loss_fn = create(options, config, mesh=model.mesh, **axes)
    inputs = {"targets": data["targets"], "segment_ids": segments, "train": is_train}
    inputs |= {"hidden_states": x, "lm_head": head}
    mean, aux, state = loss_fn(model.loss_state.get_value(), **inputs)
    model.loss_state.set_value(state)
    return mean * aux["num_tokens"], aux.get("z_loss", 0.0) * aux["num_tokens"]


def use(**options) -> None:
    """Puts the loss into MaxText's trainer, and its state into MaxText's models."""
    train.vocab_tiling_nnx_loss = lambda *call: loss(options, *call)

    def with_state(model, config, *args, init=Transformer.__init__, **kwargs):
        if config.num_vocab_tiling == 1:
            raise ValueError("the loss would not be called: set num_vocab_tiling=2")
        init(model, config, *args, **kwargs)
        model.loss_state = nnx.Variable(create(options, config).init())

    Transformer.__init__ = with_state

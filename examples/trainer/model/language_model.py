"""The language model: tokens in, keyword arguments of the unified loss out.

The model computes no logits of the next token: the loss takes `hidden_states` and
`lm_head` and multiplies them chunk by chunk. The loss config determines the multi-token
prediction heads.
"""

import functools
from typing import cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.typing import VariableDict
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

import ava_jax
from ava_jax import heads
from ava_jax.losses import layer_norm
from trainer.model.experts import Routing
from trainer.model.layers import Batch, Block, ExpertBlock, ModelConfig

# Which axes of a parameter lie along the mesh's "fsdp" and "tensor" axes, by the end of
# its path; the first ending that matches applies. The optimizer's moments end in the
# same names. Everything else is replicated.
PARAMETER_AXES: dict[str, P] = {
    "embed/embedding": P("tensor", "fsdp"),
    "lm_head": P("fsdp", "tensor"),
    "query/kernel": P("fsdp", "tensor"),
    "key/kernel": P("fsdp", "tensor"),
    "value/kernel": P("fsdp", "tensor"),
    "merge/kernel": P("tensor", "fsdp"),
    "gate/kernel": P("fsdp", "tensor"),
    "up/kernel": P("fsdp", "tensor"),
    "down/kernel": P("tensor", "fsdp"),
    "experts/gate": P(None, "fsdp", "tensor"),
    "experts/up": P(None, "fsdp", "tensor"),
    "experts/down": P(None, "tensor", "fsdp"),
    "heads/kernel": P(None, "fsdp", "tensor"),
    "heads/bias": P(None, "tensor"),
    "kernel": P("fsdp", None),
}


def partition_spec(path: str, rank: int) -> P:
    """Returns the partition spec of the array at `path` (joined by slashes).

    The stacked parameters of scanned blocks have an axis more, which is not split.
    """
    for ending, spec in PARAMETER_AXES.items():
        if path == ending or path.endswith(f"/{ending}"):
            stacked = P(None, *spec)
            return next((s for s in (spec, stacked) if len(s) == rank), P())
    return P()


def balances_by_quantiles(loss: ava_jax.UnifiedLossConfig) -> bool:
    """Whether a loss wants the scores of the routers instead of their logits."""
    return loss.use_moe_balancing and loss.moe_balancing_type == "quantile"


def is_adaptive(loss: ava_jax.UnifiedLossConfig) -> bool:
    """Whether a loss wants a confidence gate and the logits of further heads."""
    secondary = loss.use_mtp and loss.mtp_type == "adaptive"
    return secondary or loss.primary_loss_type == "adaptive_mtp"


class LanguageModel(nn.Module):
    """A decoder-only transformer with the further heads that its loss asks for.

    Attributes:
      config: the size of the transformer.
      loss: the loss it trains under.
      columns: V with padding: rows of the embedding, columns of `lm_head`.
      dtype: arithmetic of the matrix products; parameters stay float32.
      fused: return `hidden_states` and `lm_head` rather than logits.
      cache_length: positions that attention caches for decoding; see `Attention`.
      confidence_threshold: confidence from which on adaptive heads run: in training the
        mean over the gate's outputs, in decoding that of the row's last token.
    """

    config: ModelConfig
    loss: ava_jax.UnifiedLossConfig
    columns: int
    dtype: DTypeLike
    fused: bool
    cache_length: int | None = None
    confidence_threshold: float = 0.5

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        small = nn.initializers.normal(0.02)
        self.embed = nn.Embed(
            self.columns, config.width, dtype=dtype, embedding_init=small
        )
        # In a loop there is nothing that the recomputation could be merged with.
        remat = functools.partial(nn.remat, prevent_cse=not config.scan)
        dense = remat(Block) if config.remat else Block
        sparse = nn.remat(ExpertBlock) if config.remat else ExpertBlock
        dense_layers = config.layers - config.expert_layers
        cache = self.cache_length
        # With `scan`, one block stands for all.
        modules = min(1, dense_layers) if config.scan else dense_layers
        self.blocks = [dense(config, dtype, cache) for _ in range(modules)]
        self.expert_blocks = [
            sparse(config, dtype, self.loss.use_diversity_loss, cache)
            for _ in range(config.expert_layers)
        ]
        self.final_norm = nn.RMSNorm(dtype=dtype)
        self.lm_head = self.param(
            "lm_head", small, (config.width, self.columns), jnp.float32
        )
        self.mtp = self._make_heads()

    def _make_heads(self) -> nn.Module | None:
        """Returns the multi-token prediction heads that the loss asks for."""
        loss, dtype = self.loss, self.dtype
        count = loss.num_future_tokens
        if is_adaptive(loss):
            return heads.AdaptiveMTPHeads(
                num_heads=count,
                vocab_size=self.columns,
                confidence_threshold=self.confidence_threshold,
                gate_hidden_dims=(self.config.width, self.config.width // 2),
                # In decoding there is no whole row to judge by.
                per_token=True,
                dtype=dtype,
            )
        if loss.use_mtp and loss.mtp_type == "sequential":
            block = functools.partial(Block, self.config, dtype, self.cache_length)
            return heads.SequentialMTP(
                num_depths=count, block=block, use_final_norm=True, dtype=dtype
            )
        if loss.use_mtp:
            return heads.MTPHeads(num_heads=count, vocab_size=self.columns, dtype=dtype)
        return None

    def __call__(
        self, batch: Batch, routing_bias: Float[Array, "L E"] | None = None
    ) -> ava_jax.LossInputs:
        """Returns what the loss needs besides targets and masks.

        Args:
          batch: packed rows.
          routing_bias: per expert layer, from the loss state of the balancing.

        Returns:
          Keyword arguments of the loss.
        """
        embeddings = self.embed(batch.inputs)
        hidden, routing = self._run_blocks(embeddings, batch, routing_bias)
        head = self.lm_head.astype(self.dtype)
        inputs: ava_jax.LossInputs = {"hidden_states": hidden}
        inputs |= self._look_ahead(hidden, embeddings, batch)
        if not self.fused:
            inputs["logits"] = hidden @ head
        if self.fused or "mtp_hidden_states" in inputs:
            inputs["lm_head"] = head
        if routing is not None:
            # Quantiles are those of what the experts were chosen by.
            scored = balances_by_quantiles(self.loss)
            inputs |= {
                "gate_logits": routing.scores if scored else routing.gate_logits,
                "expert_indices": routing.indices,
            }
            if routing.outputs is not None:
                # Layers side by side on the feature axis: one similarity for them all.
                inputs["expert_outputs"] = jnp.concatenate(routing.outputs, axis=-1)
        return inputs

    def hidden_states(
        self, batch: Batch, routing_bias: Float[Array, "L E"] | None = None
    ) -> tuple[Float[Array, "B S D"], Float[Array, "D V"]]:
        """Returns hidden states and `lm_head`, without the further heads."""
        hidden, _ = self._run_blocks(self.embed(batch.inputs), batch, routing_bias)
        return hidden, self.lm_head.astype(self.dtype)

    def is_confident(self, hidden: Float[Array, "B D"]) -> Bool[Array, "B"]:
        """Returns where the gate would run the adaptive heads."""
        gated = cast(heads.AdaptiveMTPHeads, self.mtp)
        return gated.gate(hidden[:, None])[:, 0, 0] >= self.confidence_threshold

    def parallel_logits(self, hidden: Float[Array, "B D"]) -> Float[Array, "K B V"]:
        """Returns the parallel heads' logits for one token per row, without the gate.

        As `MTPHeads`, but as K products with K copies: of one product with all kernels
        side by side, XLA makes a copy of the kernels each time.
        """
        mtp = self.mtp
        module = mtp.heads if isinstance(mtp, heads.AdaptiveMTPHeads) else mtp
        norm, layer = (
            cast(nn.Module, module).variables["params"][n] for n in ("norm", "heads")
        )
        normed = layer_norm(hidden, norm["scale"], norm["bias"]).astype(self.dtype)
        kernel, shift = (layer[n].astype(self.dtype) for n in ("kernel", "bias"))
        copies = jnp.broadcast_to(normed, (len(kernel), *normed.shape))
        return copies @ kernel + shift[:, None]

    def look_deeper(
        self,
        depth: int,
        hidden: Float[Array, "B S D"],
        ahead: Int[Array, "B S"],
        batch: Batch,
    ) -> tuple[Float[Array, "B S D"], Float[Array, "B S D"]]:
        """Runs one depth of the sequential heads: see `SequentialMTP.depth`.

        Args:
          depth: j, from 1.
          hidden: of the depth before; at depth 1 those of `hidden_states`.
          ahead: the token j positions later.
          batch: says by its positions where `hidden` lies in the row.
        """
        sequential = cast(heads.SequentialMTP, self.mtp)
        return sequential.depth(depth, hidden, self.embed(ahead), batch)

    def _run_blocks(
        self,
        x: Float[Array, "B S D"],
        batch: Batch,
        routing_bias: Float[Array, "L E"] | None,
    ) -> tuple[Float[Array, "B S D"], Routing | None]:
        if self.config.scan and self.blocks:
            x = self._scan_blocks(x, batch)
        else:
            for block in self.blocks:
                x = block(x, batch)
        routings: list[Routing] = []
        for layer, block in enumerate(self.expert_blocks):
            bias = None if routing_bias is None else routing_bias[layer]
            x, routing = block(x, batch, bias)
            routings.append(routing)
        x = self.final_norm(x)
        if not routings:
            return x, None
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *routings)

    def _scan_blocks(
        self, x: Float[Array, "B S D"], batch: Batch
    ) -> Float[Array, "B S D"]:
        """Runs the dense blocks as one loop over their stacked parameters."""

        def step(
            block: nn.Module, x: Float[Array, "B S D"], _: None
        ) -> tuple[Float[Array, "B S D"], None]:
            return cast(Block, block)(x, batch), None

        scan = nn.scan(
            step,
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            length=self.config.layers - self.config.expert_layers,
        )
        return scan(self.blocks[0], x, None)[0]

    def _look_ahead(
        self,
        hidden: Float[Array, "B S D"],
        embeddings: Float[Array, "B S D"],
        batch: Batch,
    ) -> ava_jax.LossInputs:
        """Returns the inputs of the multi-token prediction terms."""
        unmasked = batch.segment_ids > 0
        if isinstance(self.mtp, heads.AdaptiveMTPHeads):
            out = self.mtp(hidden, unmasked)
            return {
                "additional_logits": out.additional_logits,
                "confidence_scores": out.confidence_scores,
                "mtp_active": out.mtp_active,
            }
        if isinstance(self.mtp, heads.SequentialMTP):
            ahead = self.mtp(hidden, embeddings, batch, segment_ids=batch.segment_ids)
            return {"mtp_hidden_states": ahead}
        if isinstance(self.mtp, heads.MTPHeads):
            # Called for its parameters: the loss does the multiplication itself.
            if self.is_initializing():
                self.mtp(hidden)
            return {"mtp_params": self.mtp.variables["params"]}
        return {}


def loss_inputs(
    model: LanguageModel,
    params: optax.Params,
    batch: Batch,
    routing_bias: Float[Array, "L E"] | None,
) -> ava_jax.LossInputs:
    """Applies the model to a batch; returns all that a loss may `select`."""
    out = model.apply(with_params(params), batch, routing_bias)
    inputs: ava_jax.LossInputs = {
        "targets": batch.targets,
        "attention_mask": batch.segment_ids > 0,
        "segment_ids": batch.segment_ids,
    }
    return inputs | cast(ava_jax.LossInputs, out)


def hidden_and_head(
    model: LanguageModel,
    params: optax.Params,
    batch: Batch,
    routing_bias: Float[Array, "L E"] | None,
) -> tuple[Float[Array, "B S D"], Float[Array, "D V"]]:
    """Applies the transformer alone, for evaluation and sampling."""
    out = model.apply(
        with_params(params), batch, routing_bias, method=LanguageModel.hidden_states
    )
    return cast(tuple[Array, Array], out)


def with_params(params: optax.Params) -> VariableDict:
    """Returns the variables of a model that has only parameters."""
    return cast(VariableDict, {"params": params})

"""Multi-token prediction: parallel heads, sequential depths, adaptive heads."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.config import Settings, Weight
from ava_jax.inputs import (
    LossInputs,
    array,
    check_float,
    mtp_parameters,
)
from ava_jax.kernel.fused import token_sums
from ava_jax.kernel.passes import Operands
from ava_jax.losses.mtp import (
    layer_norm,
)
from ava_jax.reduce import float_dtype, safe_divide
from ava_jax.terms.base import (
    Aux,
    BatchTerm,
    Call,
    Output,
    Scalar,
    Term,
    TokenInputs,
)
from ava_jax.terms.objective import Group, HeadObjective, token_inputs
from ava_jax.tokens import Tokens, ahead, stack_ahead


def usable_heads(num_heads: int, tokens: Tokens) -> int:
    """Returns how many of the heads look at a target in the row."""
    return max(0, min(num_heads, tokens.targets.shape[1] - 1))


def head_inputs(tokens: Tokens, num_heads: int) -> TokenInputs:
    """Returns the token inputs of heads 1…K, stacked on a leading axis."""
    stacked = stack_ahead(tokens, num_heads)
    index = jnp.arange(num_heads, dtype=jnp.int32)[:, None, None]
    return token_inputs(
        stacked, prepared=jnp.broadcast_to(index, stacked.targets.shape)
    )


def head_weights(tokens: Tokens, num_heads: int) -> Float[Array, "K"]:
    """Returns the sum of the weights of the pairs that each head predicts."""
    return jnp.stack(
        [jnp.sum(ahead(tokens, j).weights) for j in range(1, num_heads + 1)]
    )


def head_denominators(call: Call, num_heads: int) -> Float[Array, "K"]:
    """Returns what the mean of each head is divided by."""
    known = call.normalizers.heads
    if known.shape[0] < num_heads:
        raise ValueError(
            f"normalizers are for {known.shape[0]} heads, but {num_heads} are given: "
            "set num_future_tokens to the number of heads"
        )
    return known[:num_heads]


class _Heads(Term):
    """The mean over heads of their mean cross-entropies.

    Attributes:
      num_heads: K; those that look past the end of every row are left out.
    """

    num_heads: int
    keys = ("mtp_loss", "mtp_head_losses")

    def counts(self, tokens: Tokens, inputs: LossInputs) -> dict[str, Array]:
        return {"heads": head_weights(tokens, self.num_heads)}

    def _objective(self, call: Call, count: int) -> HeadObjective:
        settings = call.settings
        return HeadObjective(
            self.name, count, settings.vocab_size, settings.logit_soft_cap
        )

    def _coefficients(self, call: Call, count: int) -> dict[str, Float[Array, "K"]]:
        """Returns the weight of each head's sum in the loss."""
        weight = self.weight_at(call.step) / count
        return {self.name: safe_divide(weight, head_denominators(call, count))}

    def _means(self, call: Call, sums: Float[Array, "K"] | None) -> Float[Array, "K"]:
        """Returns the heads' means from their sums, of which there may be none."""
        if sums is None:
            return jnp.zeros((0,), float_dtype())
        return safe_divide(sums, head_denominators(call, sums.shape[0]))

    def _loss(self, call: Call, means: Float[Array, "K"]) -> tuple[Scalar, Aux]:
        count = max(means.shape[0], 1)
        loss = self.weight_at(call.step) * jnp.sum(means) / count
        return loss, {"mtp_head_losses": means, "mtp_loss": loss}


@dataclasses.dataclass(frozen=True)
class ParallelHeads(_Heads, BatchTerm):
    """K heads over the normalised hidden states, each with a matrix of its own.

    No head's logits exist whole.

    Attributes:
      num_heads: K.
      hidden_size: D.

    References:
      Gloeckle et al., Better & Faster LLMs via Multi-token Prediction, 2024.
    """

    num_heads: int
    hidden_size: int
    weight: Weight
    name: str = "mtp_loss"
    option = 'mtp_type="parallel"'
    requires = ("hidden_states", "mtp_params")

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        kernel = mtp_parameters(inputs)["heads"]["kernel"]
        wanted = (self.num_heads, self.hidden_size)
        if kernel.shape[:2] != wanted or kernel.shape[2] < settings.vocab_size:
            raise ValueError(
                'mtp_params["heads"]["kernel"] must be [num_future_tokens, hidden_size,'
                f" vocab_size] = {(*wanted, settings.vocab_size)}, got {kernel.shape}"
            )

    def finish(self, call: Call) -> Output:
        count = usable_heads(self.num_heads, call.tokens)
        if count < 1:
            loss, aux = self._loss(call, self._means(call, None))
            return Output(loss, loss, aux)
        heads = head_inputs(call.tokens, count)
        params = mtp_parameters(call.inputs)
        counted = jnp.any(heads.weights != 0, 0)[..., None]
        hidden = call.array("hidden_states")
        hidden = jnp.where(counted, hidden, jnp.zeros_like(hidden))
        normed = layer_norm(hidden, params["norm"]["scale"], params["norm"]["bias"])
        operands = Operands(
            sources=(normed[None],),
            inputs=(heads,),
            active=(heads.weights != 0,),
            rows=None,
            shared=None,
            kernel=params["heads"]["kernel"][:count],
            bias=params["heads"]["bias"][:count],
        )
        objectives = (self._objective(call, count),)
        coefficients = self._coefficients(call, count)
        total, sums = token_sums(objectives, operands, coefficients, call.plan)
        loss, aux = self._loss(call, self._means(call, sums[self.name]))
        return Output(loss, total, aux)


@dataclasses.dataclass(frozen=True)
class SequentialHeads(_Heads):
    """K depths whose hidden states go through the main head's matrix.

    They are a group of their own in the same pass, so memory does not grow with K.

    Attributes:
      num_heads: K.

    References:
      DeepSeek-V3 Technical Report, 2024.
    """

    num_heads: int
    weight: Weight
    name: str = "mtp_loss"
    option = 'mtp_type="sequential"'
    requires = ("mtp_hidden_states", "lm_head")
    accepts = ("lm_head_bias",)

    def check(self, inputs: LossInputs, settings: Settings) -> None:
        hidden = array(inputs, "mtp_hidden_states")
        start = (self.num_heads, *array(inputs, "targets").shape)
        check_float("mtp_hidden_states", hidden, start, 4)

    def group(self, call: Call) -> Group | None:
        """Returns the depths' tokens; None if no depth has any."""
        count = usable_heads(self.num_heads, call.tokens)
        if count < 1:
            return None
        return Group(
            self._objective(call, count),
            call.array("mtp_hidden_states")[:count],
            head_inputs(call.tokens, count),
            True,
            self._coefficients(call, count),
        )

    def finish(self, call: Call, sums: Float[Array, "K"] | None) -> Output:
        """Returns what the depths add to the call, given their sums."""
        loss, aux = self._loss(call, self._means(call, sums))
        return Output(loss, jnp.zeros_like(loss), aux)

"""Log-probabilities of tokens, from logits or from hidden states, differentiable."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
from jax.lax import PrecisionLike
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Integer, Num, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.assemble import plan_of
from ava_jax.checks import check_inputs
from ava_jax.config import Settings, UnifiedLossConfig
from ava_jax.inputs import LossInputs, array, read_arrays, tokens_of
from ava_jax.kernel.fused import token_values
from ava_jax.kernel.passes import Operands
from ava_jax.kernel.platforms import Implementation
from ava_jax.kernel.product import Product
from ava_jax.kernel.sharding import Layout, make_layout, run_whole
from ava_jax.kernel.statistics import cooled, token_statistics
from ava_jax.kernel.stats import Kernel, Query
from ava_jax.ranges import check_range
from ava_jax.reduce import as_float
from ava_jax.tokens import Tokens


@flax.struct.dataclass
class TokenLogProbs:
    """What `token_log_probs` returns; masked tokens have 0, without a gradient.

    Attributes:
      log_probs: `log p_y`, in nats.
      entropy: `−Σ p log p`, in nats.
      log_z: `logsumexp(z/T)`.
      num_invalid_targets: how many tokens are masked only because their id is outside
        the vocabulary.
    """

    log_probs: Float[Array, "B S"]
    entropy: Float[Array, "B S"]
    log_z: Float[Array, "B S"]
    num_invalid_targets: Int[Array, ""]


@functools.partial(with_checked_arrays, sizes=False)
def token_log_probs(
    *,
    targets: Integer[Array, "B S"],
    logits: Float[Array, "B S V"] | None = None,
    hidden_states: Float[Array, "B S D"] | None = None,
    lm_head: Float[Array, "D V"] | None = None,
    lm_head_bias: Float[Array, "V"] | None = None,
    attention_mask: Shaped[Array, "B S"] | None = None,
    temperature: float | Num[Array, ""] = 1.0,
    logit_soft_cap: float | None = None,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    precision: PrecisionLike = None,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] = (),
    sequence_axis: str | None = None,
    vocab_axis: str | None = None,
) -> TokenLogProbs:
    """Computes each target's log-probability, and the entropy, without the logits.

    With `z` the soft-capped logits and T the temperature, `log_probs = z_y/T − log_z`,
    `log_z = logsumexp(z/T)` and `entropy` of the same distribution. From hidden states
    this takes 2·N·D·V flops, and 8·N·D·V with the gradient (6 if only one of hidden
    states and `lm_head` is differentiated); no array has N·V elements. Chunks of masked
    tokens cost nothing. The statistics are float32 whatever the arrays are.

    Args:
      targets: ids [B, S]; position t holds the token that position t predicts.
      logits: [B, S, V]; or else the two that follow.
      hidden_states: [B, S, D].
      lm_head: [D, V]; the product is taken in the wider of the two dtypes.
      lm_head_bias: [V].
      attention_mask: [B, S]; where it is 0 the arrays may hold anything.
      temperature: T > 0, a number or a scalar; it is differentiable, too.
      logit_soft_cap: every logit z becomes cap·tanh(z/cap) first.
      vocab_size: V, if `lm_head` or the logits have more columns, which are padding.
      ignore_index: a target id that is masked.
      chunk_size: tokens of a row whose logits are made at a time; None chooses.
      block_size: tokens of a row whose logits are reduced at a time; None chooses.
      implementation: of the kernel; None follows the platform.
      precision: of the three products with `lm_head`, see `jax.lax.Precision`. A TPU
        multiplies float32 in bfloat16 by default; `"highest"` is exact.
      mesh: the mesh that the arrays are sharded over.
      batch_axes: its axes that share the rows.
      sequence_axis: its axis that shares each row's tokens.
      vocab_axis: its axis that shares the vocabulary.

    Returns:
      `TokenLogProbs`, arrays [B, S].

    Raises:
      TypeError: an array has the wrong dtype.
      ValueError: an array is missing or does not fit, or a number is out of its range.

    Example:
      >>> import jax, jax.numpy as jnp, ava_jax
      >>> out = jax.jit(ava_jax.token_log_probs)(
      ...     targets=jnp.array([[1, 2]]), hidden_states=jnp.ones((1, 2, 4)),
      ...     lm_head=jnp.zeros((4, 8)))
      >>> [round(float(x), 4) for x in out.log_probs[0]]
      [-2.0794, -2.0794]

    References:
      Shao et al., DeepSeekMath, 2024 (one use, in reinforcement learning).
    """
    inputs: LossInputs = {
        "targets": targets,
        "logits": logits,
        "hidden_states": hidden_states,
        "lm_head": lm_head,
        "lm_head_bias": lm_head_bias,
        "attention_mask": attention_mask,
    }
    check_logits(inputs, {"chunk_size": chunk_size, "precision": precision})
    settings = pass_settings(
        lm_head if logits is None else logits,
        vocab_size,
        ignore_index=ignore_index,
        logit_soft_cap=logit_soft_cap,
        chunk_size=chunk_size,
        block_size=block_size,
        implementation=implementation,
        precision=precision,
    )
    check_inputs(settings, (), inputs)
    layout = make_layout(mesh, batch_axes, sequence_axis, vocab_axis)
    # Without a layout, under Explicit axes, the values are where the targets are.
    spec = (
        jax.typeof(targets).sharding.spec if layout is None else layout.token_arrays()
    )
    values, num_invalid = run_whole(
        _compute,
        (settings, layout),
        read_arrays(cast(LossInputs, given(**inputs))),
        read_temperature(temperature),
        out_specs=(dict.fromkeys(_LogProbs.names, spec), P()),
    )
    return TokenLogProbs(**values, num_invalid_targets=num_invalid)


def pass_settings(
    widest: Float[Array, "..."] | None, vocab_size: int | None, **options: Any
) -> Settings:
    """Returns the settings of a pass without a config.

    Args:
      widest: the logits or `lm_head`, whose width is V unless that is given.
      vocab_size: V, if it is given.
      **options: fields of `UnifiedLossConfig`.
    """
    width = widest.shape[-1] if widest is not None and widest.ndim else 2
    size = width if vocab_size is None else vocab_size
    return UnifiedLossConfig(vocab_size=size, **options).settings


def given(**arrays: Any) -> dict[str, Any]:
    """Returns the arrays that are not None."""
    return {name: value for name, value in arrays.items() if value is not None}


def _compute(
    settings: Settings,
    layout: Layout | None,
    inputs: LossInputs,
    temperature: Float[Array, ""] | None,
) -> tuple[dict[str, Float[Array, "B S"]], Int[Array, ""]]:
    tokens = tokens_of(settings, inputs)
    operands = token_operands(inputs, query_of(tokens), tokens, temperature)
    function = _LogProbs(settings.vocab_size, settings.logit_soft_cap)
    plan = plan_of(settings, layout, inputs, tokens)
    values = token_values(function, operands, plan)
    kept = {name: only_active(tokens, value[0]) for name, value in values.items()}
    return kept, jnp.sum(tokens.invalid, dtype=jnp.int32)


def check_logits(inputs: LossInputs, of_product: Mapping[str, Any]) -> None:
    """Raises on arguments that make no sense beside logits.

    Args:
      inputs: the call's arrays.
      of_product: options of the product that makes the logits.
    """
    if inputs.get("logits") is None:
        return
    names = ("hidden_states", "lm_head", "lm_head_bias")
    both = [name for name in names if inputs.get(name) is not None]
    if both:
        raise ValueError(
            "pass either logits or hidden_states with lm_head, not both: got logits "
            f"and {' and '.join(both)}"
        )
    for name, value in of_product.items():
        if value is not None:
            raise ValueError(
                f"{name} is for hidden_states with lm_head, got {value!r} with logits, "
                "which exist already: leave it out"
            )


def read_temperature(
    temperature: float | Num[Array, ""],
) -> Float[Array, ""] | None:
    """Returns a temperature as a scalar array; None for the number 1.

    Raises:
      TypeError: it is no number.
      ValueError: it is not above 0, as far as its value is known, or no scalar.
    """
    # NumPy's float64 is a Python float as well.
    is_number = isinstance(temperature, int | float)
    if not is_number and jnp.ndim(temperature):
        raise ValueError(
            f"temperature must be a number or a scalar, got {jnp.shape(temperature)}: "
            "divide the logits where it differs from token to token"
        )
    check_range("temperature", temperature, 0, inclusive=False)
    return None if is_number and temperature == 1 else as_float(temperature)


def query_of(tokens: Tokens) -> Query:
    """Returns the query of the targets alone."""
    return Query(tokens.targets, tokens.active, log_one_minus_p=False, top=False)


def token_operands(
    inputs: LossInputs, own: Any, tokens: Tokens, shared: Any, rows: Any = None
) -> Operands:
    """Returns the operands of a pass over one array of logits or hidden states.

    Args:
      inputs: the call's arguments.
      own: inputs of each token, a pytree of arrays [B, S, ...].
      tokens: the tokens.
      shared: what every block sees whole.
      rows: what every block of a row sees whole.
    """
    is_projected = inputs.get("logits") is None
    source = array(inputs, "hidden_states" if is_projected else "logits")
    return Operands(
        sources=(source[None],),
        inputs=(jax.tree.map(lambda x: x[None], own),),
        active=(tokens.active[None],),
        rows=rows,
        shared=shared,
        kernel=inputs.get("lm_head") if is_projected else None,
        bias=inputs.get("lm_head_bias") if is_projected else None,
    )


def only_active(tokens: Tokens, values: Float[Array, "B S"]) -> Float[Array, "B S"]:
    """Returns values with 0 for masked tokens."""
    return jnp.where(tokens.active, values, jnp.zeros_like(values))


@dataclasses.dataclass(frozen=True)
class _LogProbs:
    """The values of `TokenLogProbs`, for the pass over the tokens."""

    vocab_size: int
    soft_cap: float | None
    names = ("log_probs", "entropy", "log_z")

    def __call__(
        self,
        logits: Float[Array, "B C V"] | Product,
        inputs: Query,
        rows: None,
        shared: Float[Array, ""] | None,
        kernel: Kernel,
    ) -> dict[str, Float[Array, "B C"]]:
        """Computes the values; `shared` is the temperature."""
        vocabulary = kernel.vocabulary(self.vocab_size, self.soft_cap)
        if shared is not None:
            logits, vocabulary = cooled(logits, inputs.active, vocabulary, shared)
        stats = token_statistics(logits, inputs, vocabulary)
        return {
            "log_probs": -stats.nll,
            "entropy": stats.entropy,
            "log_z": stats.log_z,
        }

    def num_ids(self, inputs: Query, rows: None, shared: Any) -> int | None:
        """Returns that it wants one logit of a token; None, all, with a soft-cap."""
        del inputs, rows, shared
        return 1 if self.soft_cap is None else None

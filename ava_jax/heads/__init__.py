"""Flax modules that predict more than one token ahead.

`MTPHeads` are parallel heads on one hidden state, `ConfidenceGate` predicts a
confidence in them, `AdaptiveMTPHeads` runs the heads only if that is high enough, and
`SequentialMTP` chains one transformer block per depth, as DeepSeek-V3 does. All are
Linen modules; `NNXHeads` makes an NNX module of any of them, with the same parameters.

Common attributes: `dtype` is the dtype of the computation (`None`: that of
`hidden_states`), `param_dtype` that of the parameters. Norms, pooling and confidences
are always computed in float32 (float64 under x64). Dropout is active only with
`deterministic=False`, and then needs a `"dropout"` key in `rngs`.
"""

from ava_jax.heads.gated import AdaptiveMTPHeads as AdaptiveMTPHeads
from ava_jax.heads.gated import AdaptiveMTPOutput as AdaptiveMTPOutput
from ava_jax.heads.gated import ConfidenceGate as ConfidenceGate
from ava_jax.heads.nnx_heads import NNXHeads as NNXHeads
from ava_jax.heads.parallel import MTPHeads as MTPHeads
from ava_jax.heads.sequential import SequentialMTP as SequentialMTP

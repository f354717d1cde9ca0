"""The loss layer for training language models in JAX."""

from ava_jax import heads as heads
from ava_jax import losses as losses
from ava_jax import metrics as metrics
from ava_jax import terms as terms
from ava_jax.assemble import StepStats as StepStats
from ava_jax.config import UnifiedLossConfig as UnifiedLossConfig
from ava_jax.debug import checked as checked
from ava_jax.distillation import distillation_loss as distillation_loss
from ava_jax.inputs import LossInputs as LossInputs
from ava_jax.inputs import Normalizers as Normalizers
from ava_jax.kernel.statistics import token_statistics as token_statistics
from ava_jax.kernel.stats import Query as Query
from ava_jax.kernel.stats import TokenStats as TokenStats
from ava_jax.kernel.stats import Vocabulary as Vocabulary
from ava_jax.log_probs import TokenLogProbs as TokenLogProbs
from ava_jax.log_probs import token_log_probs as token_log_probs
from ava_jax.losses.moe import BiasBalanceState as BiasBalanceState
from ava_jax.losses.moe import GradientBalanceState as GradientBalanceState
from ava_jax.state import LossState as LossState
from ava_jax.state import fold_temperature as fold_temperature
from ava_jax.state import reset_statistics as reset_statistics
from ava_jax.state import statistics as statistics
from ava_jax.terms.base import BatchTerm as BatchTerm
from ava_jax.terms.base import TokenInputs as TokenInputs
from ava_jax.terms.base import TokenTerm as TokenTerm
from ava_jax.terms.user import ExtraTerm as ExtraTerm
from ava_jax.unified import UnifiedLoss as UnifiedLoss
from ava_jax.unified import compose as compose
from ava_jax.unified import create_unified_loss as create_unified_loss
from ava_jax.unified import unified_loss as unified_loss

__version__ = "0.2.0"

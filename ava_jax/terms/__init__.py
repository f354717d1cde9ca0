"""Every term of the unified loss as an object of its own, and the list of a config.

A loss is a list of these: `ava_jax.compose` takes them as they are, and
`ava_jax.unified_loss` makes the list of a flat config by `terms_of`.
"""

from ava_jax.terms.adaptive import AdaptiveHeads as AdaptiveHeads
from ava_jax.terms.adaptive import AdaptivePrimary as AdaptivePrimary
from ava_jax.terms.adaptive import AdaptiveSecondary as AdaptiveSecondary
from ava_jax.terms.base import BatchTerm as BatchTerm
from ava_jax.terms.base import Call as Call
from ava_jax.terms.base import LogitsTerm as LogitsTerm
from ava_jax.terms.base import Output as Output
from ava_jax.terms.base import Step as Step
from ava_jax.terms.base import Term as Term
from ava_jax.terms.base import TokenInputs as TokenInputs
from ava_jax.terms.base import TokenTerm as TokenTerm
from ava_jax.terms.contrastive import InfoNCE as InfoNCE
from ava_jax.terms.contrastive import Margin as Margin
from ava_jax.terms.contrastive import SimCTG as SimCTG
from ava_jax.terms.contrastive import Triplet as Triplet
from ava_jax.terms.distillation import Distillation as Distillation
from ava_jax.terms.distillation import TopKDistillation as TopKDistillation
from ava_jax.terms.likelihood import CrossEntropy as CrossEntropy
from ava_jax.terms.likelihood import FocalLoss as FocalLoss
from ava_jax.terms.likelihood import TokenDiversity as TokenDiversity
from ava_jax.terms.likelihood import ZLoss as ZLoss
from ava_jax.terms.listing import RESERVED_NAMES as RESERVED_NAMES
from ava_jax.terms.listing import terms_of as terms_of
from ava_jax.terms.mtp import ParallelHeads as ParallelHeads
from ava_jax.terms.mtp import SequentialHeads as SequentialHeads
from ava_jax.terms.policy import PolicyTerm as PolicyTerm
from ava_jax.terms.repetition import ContrastiveToken as ContrastiveToken
from ava_jax.terms.repetition import EarlyEOSPenalty as EarlyEOSPenalty
from ava_jax.terms.repetition import ImmediatePenalty as ImmediatePenalty
from ava_jax.terms.repetition import NgramPenalty as NgramPenalty
from ava_jax.terms.repetition import TargetEarlyEOS as TargetEarlyEOS
from ava_jax.terms.repetition import TargetNgrams as TargetNgrams
from ava_jax.terms.repetition import TargetRuns as TargetRuns
from ava_jax.terms.repetition import TokenUnlikelihood as TokenUnlikelihood
from ava_jax.terms.router import AuxiliaryDiversity as AuxiliaryDiversity
from ava_jax.terms.router import BiasBalancing as BiasBalancing
from ava_jax.terms.router import ExpertDiversity as ExpertDiversity
from ava_jax.terms.router import GradientBalancing as GradientBalancing
from ava_jax.terms.router import LoadBalancing as LoadBalancing
from ava_jax.terms.router import QuantileBalancing as QuantileBalancing
from ava_jax.terms.router import RouterZLoss as RouterZLoss
from ava_jax.terms.temperature import AdaptiveTemperature as AdaptiveTemperature
from ava_jax.terms.temperature import TemperedCrossEntropy as TemperedCrossEntropy
from ava_jax.terms.temperature import TemperedFocalLoss as TemperedFocalLoss

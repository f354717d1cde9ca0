"""The losses as pure functions."""

from ava_jax.losses.consistency import consistency_loss as consistency_loss
from ava_jax.losses.contrastive import (
    contrastive_infonce_loss as contrastive_infonce_loss,
)
from ava_jax.losses.contrastive import (
    contrastive_margin_loss as contrastive_margin_loss,
)
from ava_jax.losses.contrastive import (
    contrastive_triplet_loss as contrastive_triplet_loss,
)
from ava_jax.losses.contrastive import simctg_loss as simctg_loss
from ava_jax.losses.distillation import top_k_divergence as top_k_divergence
from ava_jax.losses.likelihood import focal_cross_entropy as focal_cross_entropy
from ava_jax.losses.likelihood import focal_loss as focal_loss
from ava_jax.losses.likelihood import label_smoothing_loss as label_smoothing_loss
from ava_jax.losses.likelihood import log_z_squared as log_z_squared
from ava_jax.losses.likelihood import perplexity as perplexity
from ava_jax.losses.likelihood import smoothed_cross_entropy as smoothed_cross_entropy
from ava_jax.losses.likelihood import token_diversity as token_diversity
from ava_jax.losses.moe import coefficient_of_variation as coefficient_of_variation
from ava_jax.losses.moe import expert_balance_ratio as expert_balance_ratio
from ava_jax.losses.moe import expert_diversity_loss as expert_diversity_loss
from ava_jax.losses.moe import gradient_balance_loss as gradient_balance_loss
from ava_jax.losses.moe import max_violation as max_violation
from ava_jax.losses.moe import route as route
from ava_jax.losses.moe import update_bias as update_bias
from ava_jax.losses.moe import update_gradient_balance as update_gradient_balance
from ava_jax.losses.mtp import confidence_regularizer as confidence_regularizer
from ava_jax.losses.mtp import effective_mtp_weight as effective_mtp_weight
from ava_jax.losses.mtp import layer_norm as layer_norm
from ava_jax.losses.policy import group_advantages as group_advantages
from ava_jax.losses.policy import policy_loss as policy_loss
from ava_jax.losses.policy import sampler_weights as sampler_weights
from ava_jax.losses.policy_tokens import PolicyValues as PolicyValues
from ava_jax.losses.policy_tokens import policy_values as policy_values
from ava_jax.losses.preference import cpo_loss as cpo_loss
from ava_jax.losses.preference import dpo_loss as dpo_loss
from ava_jax.losses.preference import kto_loss as kto_loss
from ava_jax.losses.preference import orpo_loss as orpo_loss
from ava_jax.losses.preference import sequence_log_probs as sequence_log_probs
from ava_jax.losses.preference import simpo_loss as simpo_loss
from ava_jax.losses.quantile import cutoff_histogram as cutoff_histogram
from ava_jax.losses.quantile import quantile_bias as quantile_bias
from ava_jax.losses.repetition import anti_repetition_loss as anti_repetition_loss
from ava_jax.losses.repetition import contrastive_token_loss as contrastive_token_loss
from ava_jax.losses.repetition import repeat_spans as repeat_spans
from ava_jax.losses.repetition import repetition_decay_loss as repetition_decay_loss
from ava_jax.losses.repetition import sequence_unlikelihood as sequence_unlikelihood
from ava_jax.losses.router import RouterLoad as RouterLoad
from ava_jax.losses.router import (
    auxiliary_load_balancing_loss as auxiliary_load_balancing_loss,
)
from ava_jax.losses.router import auxiliary_router_z_loss as auxiliary_router_z_loss
from ava_jax.losses.router import load_balancing_loss as load_balancing_loss
from ava_jax.losses.router import router_load as router_load
from ava_jax.losses.router import router_z_loss as router_z_loss
from ava_jax.losses.router import sequence_balance_loss as sequence_balance_loss
from ava_jax.losses.weighting import homoscedastic_weighting as homoscedastic_weighting
from ava_jax.losses.weighting import weigh_losses as weigh_losses

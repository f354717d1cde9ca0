"""Names that other libraries use for what is called otherwise here."""

import difflib
from collections.abc import Iterable

# What to use in place of a name; a sentence where nothing takes its place.
ALIASES = {
    # The PyTorch losses of the Ava pipeline.
    "return_detailed": "The second result, aux, holds all parts; leave it out",
    "mtp_loss_weight": "mtp_weight",
    "repetition_penalty_weight": "immediate_repetition_weight",
    "use_repetition_penalty": "use_immediate_repetition_penalty",
    "temperature_init": "initial_temperature",
    "num_heads": "num_future_tokens",
    "weights": "attention_mask, whose numbers are weights",
    "loss_mask": "attention_mask",
    "mask": "attention_mask",
    "attention": "attention_mask",
    "labels": "targets, shifted by one position: targets[:, t] follows inputs[:, t]",
    "extra_terms": "Give it as a term: ava_jax.unified_loss(config, [your_term])",
    # PyTorch and optax.
    "input": "logits",
    "target": "targets",
    "outputs": "logits",
    "predictions": "logits",
    "ignore_idx": "ignore_index",
    "reduction": "Losses of tokens are weighted means; token_log_probs gives each one",
    "size_average": "Losses of tokens are weighted means; leave it out",
    "weight": "attention_mask for tokens, focal_alpha for classes",
    "smoothing": "label_smoothing",
    "epsilon_smoothing": "label_smoothing",
    # transformers, TRL, verl and tunix.
    "label_smoothing_factor": "label_smoothing",
    "num_items_in_batch": "normalizers=, from loss_fn.normalizers",
    "epsilon": "clip_low and clip_high",
    "epsilon_low": "clip_low",
    "epsilon_high": "clip_high",
    "clip_ratio": "clip_low and clip_high",
    "clip_ratio_low": "clip_low",
    "clip_ratio_high": "clip_high",
    "delta": "ratio_cap",
    "beta": "kl_weight of a policy",
    "kl_coef": "kl_weight",
    "kl_beta": "kl_weight",
    "entropy_coeff": "entropy_weight",
    "num_generations": "group_size of losses.group_advantages",
    "importance_sampling_level": "ratio_level",
    "loss_type": "kind",
    "loss_agg_mode": "kind: 'grpo', 'bnpo', 'dr_grpo' or 'dapo'",
    "completion_mask": "mask",
    "response_mask": "mask",
    "old_per_token_logps": "old_log_probs",
    "ref_per_token_logps": "ref_log_probs",
    "per_token_logps": "log_probs",
    "vllm_importance_sampling_cap": "cap of losses.sampler_weights",
    "jsd_beta": "beta",
    "lmbda": "It is a choice of data, not of the loss; leave it out",
    # Kinds.
    "ppo": "'grpo', with advantages per token",
    "gspo": "'grpo' with ratio_level='sequence'",
    "dpo": "'sigmoid'",
    "jsd": "beta=0.5 of distillation_loss",
    "rpo": "'sigmoid', and add a cross-entropy",
}


def suggestion(name: object, known: Iterable[str]) -> str:
    """Returns what to use in place of an unknown name: an alias, or the nearest one."""
    names = list(known)
    if isinstance(name, str) and name not in names and name in ALIASES:
        advice = ALIASES[name]
        return f"{advice}." if advice[0].isupper() else f"here that is {advice}."
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.0)
    return f"did you mean {near[0]!r}?" if near else "there are none"

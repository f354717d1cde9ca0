"""The temperature that a model is trained at, which is part of the model.

Under a main loss of z/T the model is `softmax(z/T)`: decoding and evaluation have to
divide by T too.
"""

import dataclasses

import optax

import ava_jax
from trainer.model.language_model import LanguageModel, with_params


def is_tempered(loss: ava_jax.UnifiedLossConfig) -> bool:
    """Whether the model of a loss is `softmax(z/T)` with another T than 1."""
    moves = loss.adaptive_temperature or loss.initial_temperature != 1
    # The focal loss has no temperature, whatever the state has.
    return loss.primary_loss_type == "deepseek" and moves and not loss.use_focal_loss


def own_temperature(loss: ava_jax.UnifiedLossConfig, state: ava_jax.LossState) -> float:
    """Returns the temperature that the model of a loss has; outside of jit."""
    if not is_tempered(loss) or state.temperature is None:
        return 1.0
    return float(state.temperature)


def fold_own_temperature(
    model: LanguageModel, params: optax.Params, state: ava_jax.LossState
) -> tuple[LanguageModel, optax.Params]:
    """Returns the same model at temperature 1: its logits are divided by its own T.

    The further heads are trained at 1. Those that share `lm_head` pick the same tokens
    as before.
    """
    temperature = own_temperature(model.loss, state)
    if temperature == 1:
        return model, params
    variables = dict(with_params(params)["params"])
    variables["lm_head"] = ava_jax.fold_temperature(variables["lm_head"], state)
    cap = model.loss.logit_soft_cap
    if cap is not None:
        loss = dataclasses.replace(model.loss, logit_soft_cap=cap / temperature)
        model = model.clone(loss=loss)
    return model, variables

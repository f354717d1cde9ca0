"""A bad config is an error that names the field, the value and what to do."""

import json
from typing import Any

import jax.numpy as jnp
import optax
import pytest

import ava_jax
from ava_jax import UnifiedLossConfig, create_unified_loss


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"vocab_size": 1}, ValueError, ["vocab_size", "2", "1"]),
        ({"vocab_size": 8.0}, TypeError, ["vocab_size", "int", "8.0"]),
        ({"vocab_size": True}, TypeError, ["vocab_size", "True"]),
        ({"label_smoothing": 1.0}, ValueError, ["label_smoothing", "[0, 1)", "1.0"]),
        ({"label_smoothing": -0.1}, ValueError, ["label_smoothing", "-0.1"]),
        ({"initial_temperature": 0.0}, ValueError, ["initial_temperature", "0"]),
        ({"initial_temperature": float("nan")}, ValueError, ["initial_temperature"]),
        ({"primary_loss_type": "deepsek"}, ValueError, ["deepsek", "deepseek"]),
        ({"penalty_source": "logits"}, ValueError, ["penalty_source", "predictions"]),
        ({"eos_token_id": 8}, ValueError, ["eos_token_id", "vocab_size=8", "8"]),
        ({"pad_token_id": -1}, ValueError, ["pad_token_id", "-1"]),
        ({"ngram_size": 0}, ValueError, ["ngram_size", "0"]),
        ({"contrastive_token_window": 0}, ValueError, ["contrastive_token_window"]),
        ({"ngram_penalty_weight": -1.0}, ValueError, ["ngram_penalty_weight"]),
        ({"ngram_penalty_weight": "0.1"}, TypeError, ["ngram_penalty_weight"]),
        ({"use_mtp": 1}, TypeError, ["use_mtp", "True or False", "1"]),
        ({"use_mtp": True}, ValueError, ["hidden_size required for multi-token"]),
        ({"use_moe_balancing": True}, ValueError, ["num_experts"]),
        ({"use_auxiliary_loss": True}, ValueError, ["num_experts"]),
        ({"moe_balancing_type": "quantiles"}, ValueError, ["quantiles", "quantile"]),
        ({"balancing_bins": 0}, ValueError, ["balancing_bins", "0"]),
        ({"bias_momentum": 1.0}, ValueError, ["bias_momentum", "[0, 1)", "1.0"]),
        ({"focal_alpha": [1.0, 2.0]}, ValueError, ["focal_alpha", "vocab_size=8"]),
        ({"focal_gamma": -0.5}, ValueError, ["focal_gamma", "-0.5"]),
        ({"logit_soft_cap": 0.0}, ValueError, ["logit_soft_cap"]),
        ({"min_temperature": 3.0}, ValueError, ["min_temperature", "max_temperature"]),
        (
            {"temperature_min_history": 200},
            ValueError,
            ["temperature_min_history", "never"],
        ),
        (
            {
                "primary_loss_type": "adaptive_mtp",
                "use_mtp": True,
                "mtp_type": "adaptive",
            },
            ValueError,
            ["use_mtp=False"],
        ),
    ],
)
def test_bad_fields(fields, error, words):
    with pytest.raises(error) as caught:
        create_unified_loss({"vocab_size": 8, **fields})
    for word in words:
        assert word in str(caught.value)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ValueError, match=r"label_smothing.*label_smoothing"):
        create_unified_loss({"vocab_size": 8, "label_smothing": 0.1})
    with pytest.raises(ValueError, match="vocab_size is required"):
        create_unified_loss({})


def test_overrides_win_and_json_round_trips():
    text = json.dumps({"vocab_size": 8, "label_smoothing": 0.2, "eos_token_id": None})
    loss_fn = create_unified_loss(json.loads(text), label_smoothing=0.3)
    assert loss_fn.config == UnifiedLossConfig(vocab_size=8, label_smoothing=0.3)


def test_config_and_loss_are_hashable_values():
    one, two = (
        create_unified_loss({"vocab_size": 3}, focal_alpha=alpha)
        for alpha in ([1, 2, 3], jnp.array([1.0, 2.0, 3.0]))
    )
    assert one == two
    assert hash(one) == hash(two)
    with pytest.raises(AttributeError):
        object.__getattribute__(one.config, "__setattr__")("vocab_size", 4)


def test_every_weight_may_be_a_schedule():
    names = [
        name for name in UnifiedLossConfig.__annotations__ if name.endswith("_weight")
    ]
    assert len(names) == 12
    names.append("bias_update_rate")
    schedule: Any = optax.linear_schedule(0.0, 1.0, 4)
    scheduled: dict[str, Any] = dict.fromkeys(names, schedule)
    config = UnifiedLossConfig(vocab_size=8, **scheduled)
    for name in names:
        assert config.is_on(name)
        assert float(config.weight(name, jnp.asarray(3))) == 0.75


def test_public_names():
    names = {name for name in dir(ava_jax) if not name.startswith("_")}
    assert {
        "UnifiedLossConfig",
        "checked",
        "create_unified_loss",
        "heads",
        "losses",
        "reset_statistics",
        "statistics",
        "unified_loss",
    } <= names

"""Gemma 2 of google-tunix, an NNX model: a tied embedding and a final soft-cap."""

from typing import Any

import pytest
from flax import nnx
from support.model_checks import (
    PLAIN,
    REASON,
    TUNIX_WARNINGS,
    Batch,
    D,
    Setting,
    V,
    batch_of,
    check_plain_is_optax,
    nnx_trainer,
    train_with,
    train_with_optax,
)
from support.tunix_checks import hidden_of, masks_of, redraw

gemma = pytest.importorskip("tunix.models.gemma.model", reason=REASON)

pytestmark = TUNIX_WARNINGS

SOFT_CAP = 30.0
WHOLE, LOCAL = gemma.AttentionType.GLOBAL, gemma.AttentionType.LOCAL_SLIDING


def make(setting: Setting) -> Any:
    """The model, with an embedding so large that the cap bends the logits."""
    config = gemma.ModelConfig(
        num_layers=2,
        num_embed=V,
        embed_dim=D,
        hidden_dim=2 * D,
        num_heads=2,
        head_dim=D // 2,
        num_kv_heads=1,
        final_logit_softcap=SOFT_CAP,
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=(LOCAL, WHOLE),
        attn_logits_soft_cap=50.0,
        sliding_window_size=4,
    )
    model = gemma.Gemma(config, rngs=nnx.Rngs(0))
    return redraw(model, "embedder", 2, seed=2, dtype=setting.dtype)


def outputs_of(model: Any, batch: Batch, setting: Setting) -> dict[str, Any]:
    """What the model gives to the loss line."""
    ids, mask = batch.ids[:, :-1], batch.mask[:, :-1]
    positions, attention = masks_of(mask)
    if setting.path == "logits":
        return {"logits": model(ids, positions, None, attention)[0]}
    return {
        "hidden_states": hidden_of(model, ids, positions, attention),
        "lm_head": model.embedder.input_embedding[...].T,
    }


train = nnx_trainer(make, outputs_of)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_from_logits_is_optax(dtype: Any) -> None:
    """The model has capped its logits already."""
    check_plain_is_optax(train, Setting(masked=True, dtype=dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_from_hidden_states_with_the_cap_is_optax(dtype: Any) -> None:
    setting = Setting("fused", masked=True, dtype=dtype)
    check_plain_is_optax(train, setting, logit_soft_cap=SOFT_CAP)


def test_the_cap_bends_the_logits() -> None:
    """The comparison is not blind: without the cap, losses are far off."""
    setting = Setting("fused", masked=True)
    logits = outputs_of(make(setting), batch_of(0, setting), Setting())["logits"]
    assert SOFT_CAP / 2 < abs(logits).max() < SOFT_CAP
    reference = train_with_optax(train, setting)
    run = train_with(train, PLAIN, setting)
    assert abs(run.losses / reference.losses - 1).min() > 1e-2

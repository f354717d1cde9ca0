"""How large an experiment is: the same for all its variants and seeds."""

import dataclasses
from typing import Literal

from trainer.model.layers import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the model, the data and the training; every variant has the same.

    Attributes:
      model: the transformer.
      vocab_size: V of the tokenizer.
      length: tokens per row (S).
      rows: rows of a step (B).
      steps: optimizer steps.
      warmup: steps of the warm-up.
      learning_rate: its peak, chosen for the plain cross-entropy.
      dtype: arithmetic of the model.
      heldout: share of the rows that training never sees.
      heldout_batches: batches of `rows` that are evaluated on.
      prompts: held-out prompts that are continued.
      prompt_length: their tokens.
      continuation: tokens that are made after each.
    """

    model: ModelConfig = dataclasses.field(
        default_factory=lambda: ModelConfig(layers=2)
    )
    vocab_size: int = 2048
    length: int = 192
    rows: int = 4
    steps: int = 1000
    warmup: int = 50
    learning_rate: float = 3e-3
    dtype: Literal["float32", "bfloat16"] = "float32"
    heldout: float = 0.05
    heldout_batches: int = 64
    prompts: int = 256
    prompt_length: int = 50
    continuation: int = 100


CPU = Sizes()
# For one accelerator: 50 million parameters and real batches.
GPU = Sizes(
    model=ModelConfig(layers=8, width=512, heads=8),
    vocab_size=8192,
    length=512,
    rows=64,
    steps=4000,
    warmup=200,
    learning_rate=1.5e-3,
    dtype="bfloat16",
    heldout_batches=16,
)

"""The measured sizes: those of the goals, and real models' scaled to a device."""

import dataclasses
from typing import NamedTuple

BATCH = 4
DEVICE_TOKENS = 16384
CPU_TOKENS = 512
CPU_WIDTH_DIVISOR = 8


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call of a loss.

    Attributes:
      tokens: N = B·S.
      vocab: V.
      width: D; 0 where there are logits only.
      dtype: of the logits, or of the hidden states and the head.
      batch: B.
      depths: K, sequential depths besides the main head.
    """

    tokens: int
    vocab: int
    width: int = 0
    dtype: str = "float32"
    batch: int = BATCH
    depths: int = 0

    @property
    def length(self) -> int:
        """S, the tokens of a row."""
        return self.tokens // self.batch

    def __str__(self) -> str:
        sizes = [self.tokens, self.width, self.vocab] if self.width else None
        text = "x".join(map(str, sizes or [self.tokens, self.vocab]))
        depths = f" K={self.depths}" if self.depths else ""
        dtype = "" if self.dtype == "float32" else f" {self.dtype}"
        return text + depths + dtype


class Model(NamedTuple):
    """A model's name, and the sizes of its head for a micro-batch of 16384 tokens."""

    name: str
    shape: Shape


MODELS = (
    # 50257 ids, padded to a multiple of 128.
    Model("GPT-2", Shape(DEVICE_TOKENS, 50304, 768)),
    Model("Llama-3-8B", Shape(DEVICE_TOKENS, 128256, 4096)),
    Model("Qwen-2.5-7B", Shape(DEVICE_TOKENS, 152064, 3584)),
    Model("Gemma-2-9B", Shape(DEVICE_TOKENS, 256000, 3584)),
    Model("DeepSeek-V3", Shape(DEVICE_TOKENS, 129280, 7168)),
)

LOGITS_WIDE = Shape(1024, 50304)
LOGITS = Shape(1024, 32768)
LOGITS_HALF = Shape(1024, 32768, dtype="bfloat16")
LOGITS_ROWS = Shape(16384, 50304, batch=8)
FUSED = Shape(2048, 32768, 512)
FUSED_WIDE = Shape(1024, 50304, 256)
FUSED_HALF = Shape(2048, 32768, 512, dtype="bfloat16")
DEPTHS = Shape(1024, 32768, 256, depths=3)
ACCELERATOR = (
    Shape(32768, 128256, 2560, dtype="bfloat16"),
    Shape(16384, 128256, 4096, dtype="bfloat16"),
    Shape(8192, 151936, 2560, dtype="bfloat16", batch=2),
)

# The named shapes of `benchmarks.compiled`: a micro-batch of a device, in bfloat16.
COMPILED = {
    "gpt2-medium": Shape(DEVICE_TOKENS, 50304, 1024, dtype="bfloat16"),
    "qwen3-4b": Shape(8192, 151936, 2560, dtype="bfloat16", batch=2),
} | {
    model.name.lower(): dataclasses.replace(model.shape, dtype="bfloat16")
    for model in MODELS
}
COMPILED["llama3-8b"] = COMPILED.pop("llama-3-8b")


def scaled(model: Model, device_kind: str) -> Shape:
    """Returns a model's sizes, scaled to the device; the vocabulary is kept.

    Args:
      model: one of `MODELS`.
      device_kind: `jax.Device.device_kind`.

    Returns:
      On a CPU 512 tokens and an eighth of the width, in float32; elsewhere the model's
      own sizes, in bfloat16.
    """
    if device_kind == "cpu":
        width = model.shape.width // CPU_WIDTH_DIVISOR
        return dataclasses.replace(model.shape, tokens=CPU_TOKENS, width=width)
    return dataclasses.replace(model.shape, dtype="bfloat16")


def tiny(shape: Shape) -> Shape:
    """Returns the shape with tiny sizes, for testing."""
    width = 16 if shape.width else 0
    return dataclasses.replace(shape, tokens=64, vocab=256, width=width)

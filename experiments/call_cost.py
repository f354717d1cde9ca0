"""The cost of a call that verifies drafts and makes new ones, in plain calls.

    python -m experiments.call_cost

Drafting pays where a call makes more tokens than that. The weights are untrained, which
changes how many drafts are right, but not what a call takes. On one core.
"""

import dataclasses
import sys

import ava_jax
from experiments import heads
from experiments.lab import Trained, build, heldout_prompts, initial_params, load_text
from experiments.run import use_one_thread
from experiments.sizes import CPU, Sizes
from trainer.model.layers import ModelConfig

MODELS = ((2, 128), (4, 256), (8, 256), (4, 512))
KINDS = ("parallel", "sequential")


def cost(sizes: Sizes, kind: str) -> float:
    """Returns the cost of a call that drafts."""
    text = load_text(sizes)
    model = build(sizes, heads.VARIANTS[kind], text)
    prompts = heldout_prompts(sizes, text).prompts
    params = initial_params(model, 0)
    state = ava_jax.unified_loss(model.loss).init()
    found = heads.decoding(sizes, Trained(model, params, state, {}, 0.0), prompts)
    return found["tokens_per_call"] / found["speed_up"]


def main() -> int:
    """Prints the table."""
    use_one_thread()
    print("| layers | width | " + " | ".join(KINDS) + " |")
    print("|---:|---:|" + "---:|" * len(KINDS))
    for layers, width in MODELS:
        model = ModelConfig(layers=layers, width=width, heads=width // 32)
        sizes = dataclasses.replace(CPU, model=model, prompts=heads.TIMED)
        cells = " | ".join(f"{cost(sizes, kind):.2f}" for kind in KINDS)
        print(f"| {layers} | {width} | {cells} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

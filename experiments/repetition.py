"""How much a model repeats itself when it decodes greedily, and what stops it.

Held-out prompts are continued greedily; what follows an end of text is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ava_jax import metrics
from experiments.additions import RepetitionDecay, SequenceUnlikelihood
from experiments.lab import Numbers, evaluate, heldout_prompts, load_text, train
from experiments.plots import plot_changes, plot_dots
from experiments.records import Results, RunRecord, picture
from experiments.sizes import CPU, GPU, Sizes
from experiments.variants import Late, Variant
from trainer.decode.decoder import before_end, generate

SIZES = {"cpu": CPU, "gpu": GPU}
LONGEST_PERIOD = 50
PENALTIES: dict[str, object] = {
    "use_ngram_penalty": True,
    "use_immediate_repetition_penalty": True,
    "eos_penalty_weight": 0.05,
}
SEQUENCES = SequenceUnlikelihood(weight=1.0, rows=4, prompt=50, count=100, start=300)


def contrastive(weight: float | Late, window: int) -> dict[str, object]:
    """Returns the fields of the contrastive token loss."""
    return {"contrastive_token_weight": weight, "contrastive_token_window": window}


VARIANTS = {
    "plain": Variant(),
    "penalties on targets": Variant(PENALTIES | {"penalty_source": "targets"}),
    "penalties": Variant(PENALTIES),
    "token unlikelihood": Variant({"unlikelihood_weight": 1.0}),
    "repetition decay": Variant(
        additions=(RepetitionDecay(weight=0.5, rows=2, spans=(2, 48)),)
    ),
    "sequence unlikelihood": Variant(additions=(SEQUENCES,)),
    "token and sequence": Variant(
        {"unlikelihood_weight": 0.5},
        (dataclasses.replace(SEQUENCES, weight=3.0),),
    ),
    "contrastive 0.1, 60": Variant(contrastive(0.1, 60)),
    "contrastive 0.3, 60": Variant(contrastive(0.3, 60)),
    "contrastive 0.3, 120": Variant(contrastive(0.3, 120)),
    "contrastive 1.0, 120": Variant(contrastive(1.0, 120), seeds=1),
    "contrastive 0.3, 120, late": Variant(contrastive(Late(0.3, 0.5), 120)),
    "contrastive 0.3, 120 and sequence": Variant(contrastive(0.3, 120), (SEQUENCES,)),
}
PATHS = ("step", "nll", "temperature", "learned_weights")


def repetition(ids: Int[Array, "N C"], mask: Bool[Array, "N C"]) -> Numbers:
    """Returns the measures of repetition of continuations."""
    rates = {
        f"repeated_{n}grams": jnp.mean(metrics.repeated_ngrams(ids, mask, ngram_size=n))
        for n in range(1, 5)
    }
    loops = metrics.longest_loop(ids, mask, max_period=LONGEST_PERIOD)
    return {k: float(v) for k, v in rates.items()} | {
        "distinct_tokens": float(metrics.distinct_ngrams(ids, mask, ngram_size=1)),
        "longest_loop": float(jnp.mean(loops.astype(jnp.float32))),
        "length": float(jnp.mean(jnp.sum(mask, axis=1).astype(jnp.float32))),
    }


def measure(sizes: Sizes, variant: Variant, seed: int) -> RunRecord:
    """Trains a variant and continues the prompts with it."""
    text = load_text(sizes)
    trained = train(sizes, variant, seed, text)
    numbers = evaluate(sizes, trained, text)
    given = heldout_prompts(sizes, text)
    lengths = jnp.full(sizes.prompts, sizes.prompt_length, jnp.int32)
    made = generate(
        trained.model,
        trained.params,
        trained.bias,
        given.prompts,
        lengths,
        jax.random.key(seed),
        count=sizes.continuation,
    )
    mask = before_end(made, text.eos)
    numbers |= repetition(made, mask)
    numbers["early_eos"] = float(jnp.mean(~mask[:, -1]))
    numbers["step_milliseconds"] = trained.step_milliseconds
    human = repetition(given.continuations, jnp.ones_like(given.continuations, bool))
    samples = [
        {
            "prompt": text.tokenizer.decode(given.prompts[row].tolist()),
            "text": text.tokenizer.decode(made[row].tolist()),
        }
        for row in range(3)
    ]
    return {
        "variant": "",
        "seed": seed,
        "numbers": numbers,
        "paths": {k: v for k, v in trained.paths.items() if k in PATHS},
        "extra": {"human": human, "samples": samples},
    }


def plot(results: Results) -> None:
    """Draws repetition and perplexity, and the change of one against the other's."""
    panels = {
        "repeated_4grams": "repeated 4-grams",
        "repeated_1grams": "repeated tokens",
        "longest_loop": "longest loop (tokens)",
        "perplexity": "held-out perplexity",
    }
    extra = results["runs"][0].get("extra", {})
    human = extra["human"] if isinstance(extra["human"], dict) else {}
    marks = {name: {"text": human[name]} for name in panels if name in human}
    plot_dots(results, panels, picture(results), marks)
    axes = {
        "perplexity": "held-out perplexity, change",
        "repeated_4grams": "repeated 4-grams, change",
    }
    goal = {"perplexity": 0.02, "repeated_4grams": -0.87}
    plot_changes(results, axes, "plain", picture(results, "changes"), goal)

"""The contrastive token loss against repetition, by weight, window and start.

Measured as the experiment on repetition measures, whose runs are its baselines.
"""

from experiments import repetition
from experiments.plots import plot_changes
from experiments.records import Results, RunRecord, picture, with_baselines
from experiments.repetition import SEQUENCES
from experiments.sizes import Sizes
from experiments.variants import Late, Variant

SIZES = repetition.SIZES


def contrastive(weight: float | Late, window: int) -> dict[str, object]:
    """Returns the fields of the contrastive token loss."""
    return {"contrastive_token_weight": weight, "contrastive_token_window": window}


VARIANTS = {
    "contrastive 0.1, 60": Variant(contrastive(0.1, 60)),
    "contrastive 0.3, 60": Variant(contrastive(0.3, 60)),
    "contrastive 0.3, 120": Variant(contrastive(0.3, 120)),
    "contrastive 1.0, 120": Variant(contrastive(1.0, 120), seeds=1),
    "contrastive 0.3, 120, late": Variant(contrastive(Late(0.3, 0.5), 120), seeds=1),
    "contrastive 0.3, 120 and sequence": Variant(
        contrastive(0.3, 120), (SEQUENCES,), seeds=1
    ),
}


def measure(sizes: Sizes, variant: Variant, seed: int) -> RunRecord:
    """Trains a variant and continues the prompts with it."""
    return repetition.measure(sizes, variant, seed)


def plot(results: Results) -> None:
    """Draws repetition and perplexity of every variant, and one against the other."""
    joined = with_baselines(results)
    repetition.plot(joined)
    axes = {
        "perplexity": "held-out perplexity, change",
        "repeated_4grams": "repeated 4-grams, change",
    }
    goal = {"perplexity": 0.02, "repeated_4grams": -0.87}
    plot_changes(joined, axes, "plain", picture(results, "changes"), goal)

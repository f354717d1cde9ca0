"""Text to train on in tests."""

import random

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]


def make_text(words: int, seed: int = 0) -> str:
    """Words that are the same for the same seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))

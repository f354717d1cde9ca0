"""Experiments: what training under the losses does, measured on held-out text.

    python -m experiments.run repetition

The model, the data and the optimizer are those of `examples/trainer`.
"""

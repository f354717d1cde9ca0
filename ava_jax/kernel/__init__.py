"""The pass over the vocabulary: its definition, its implementations, its loops.

`reduce` computes a few numbers per token (`TokenStats`) from a block of logits, and
`logits_gradient` computes the cotangent of the logits from the cotangents of those
numbers. Both have several implementations (`reference`, `cpu`, `xla`); the platform
that a program is lowered for selects one.
"""

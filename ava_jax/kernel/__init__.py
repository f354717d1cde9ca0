"""The pass over the vocabulary: its definition, its implementations, its loops.

`reduce` turns a block of logits into a few numbers per token (`TokenStats`), and
`logits_gradient` turns the cotangents of those numbers into that of the logits. Both
have several implementations (`reference`, `cpu`, `xla`), of which the platform that a
program is lowered for chooses one.
"""

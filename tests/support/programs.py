"""What a traced program computes."""

import jax
import numpy as np


def jaxprs_of(eqn):
    """The programs inside an equation, such as the body of a loop."""
    leaves = jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns"))
    inside = (getattr(leaf, "jaxpr", leaf) for leaf in leaves)
    return [jaxpr for jaxpr in inside if hasattr(jaxpr, "eqns")]


def dot_flops(jaxpr):
    """Multiply-adds of all matrix products, loops unrolled; the dearest branches'."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            inner = np.prod([lhs[i] for i in contract])
            total += 2 * inner * np.prod(eqn.outvars[0].aval.shape)
        inside = [dot_flops(jaxpr) for jaxpr in jaxprs_of(eqn)]
        is_choice = eqn.primitive.name == "cond"
        own = max(inside) if is_choice else sum(inside)
        total += eqn.params.get("length", 1) * own
    return total


def arrays_of(jaxpr):
    """The shape and dtype of all that a program computes."""
    found = {(v.aval.shape, v.aval.dtype) for eqn in jaxpr.eqns for v in eqn.outvars}
    inside = (j for eqn in jaxpr.eqns for j in jaxprs_of(eqn))
    return found.union(*map(arrays_of, inside))

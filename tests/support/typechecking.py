"""The type checker of the import hook: beartype, but not for constructors.

JAX rebuilds records with placeholders in place of arrays, so only functions are held to
the shapes in their annotations.
"""

from collections.abc import Callable

import beartype


def check(function: Callable) -> Callable:
    """Wraps a function in beartype unless it is a constructor."""
    if function.__name__ == "__init__":
        return function
    return beartype.beartype(function)

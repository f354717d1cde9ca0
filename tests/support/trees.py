"""Comparing trees of arrays."""

import jax
import numpy as np


def assert_trees_close(got, want, tolerance):
    """Compares leaves: errors are relative to the largest number of each."""

    def check(path, a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = np.max(np.abs(a - b), initial=0)
        size = max(np.max(np.abs(b), initial=0), 1e-3)
        assert error <= tolerance * size, (jax.tree_util.keystr(path), error, size)

    jax.tree_util.tree_map_with_path(check, got, want)

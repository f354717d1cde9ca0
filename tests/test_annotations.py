"""The annotations are checked, each kind of call once."""

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jaxtyping import Array, Float
from support import typechecking

from ava_jax.reduce import weighted_sum


def transpose(x: Float[Array, "a b"]) -> Float[Array, "b a"]:
    return x


def test_a_call_of_another_kind_is_checked():
    function = typechecking.checked(transpose)
    assert function(jnp.zeros((3, 3))).shape == (3, 3)
    for _ in range(2):  # a call that failed is no earlier call
        with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
            function(jnp.zeros((2, 3)))
    with pytest.raises(jaxtyping.TypeCheckError, match="parameters"):
        function(jnp.zeros((3, 3), jnp.int32))


def test_what_a_function_takes_from_around_it_is_part_of_the_kind():
    def given(y: Array):
        def product(x: Float[Array, "a b"]) -> Float[Array, "a b"]:
            return x @ y

        return typechecking.checked(product)

    assert given(jnp.zeros((3, 3)))(jnp.zeros((2, 3))).shape == (2, 3)
    with pytest.raises(jaxtyping.TypeCheckError):
        given(jnp.zeros((3, 4)))(jnp.zeros((2, 3)))


def test_the_package_is_checked():
    with pytest.raises(jaxtyping.TypeCheckError):
        jax.eval_shape(weighted_sum, jnp.zeros((2, 3)), jnp.zeros(2))

"""Both paths and all block sizes agree, and the logits never exist whole."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.programs import dot_flops
from support.trees import assert_trees_close

import ava_jax
from benchmarks.costs import dot_flops as compiled_dot_flops

B, S, D, V = 2, 11, 6, 23
EVERYTHING = {
    "vocab_size": V - 3,
    "label_smoothing": 0.1,
    "eos_token_id": 2,
    "min_sequence_length": 6,
    "ngram_size": 2,
    "z_loss_weight": 1e-2,
    "unlikelihood_weight": 0.5,
    "initial_temperature": 1.4,
    "use_mtp": True,
    "mtp_type": "sequential",
    "num_future_tokens": 2,
    "logit_soft_cap": 5.0,
}


def batch(scale=1.0, dtype: Any = np.float32) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)
    arrays = {
        "hidden_states": scale * rng.normal(size=(B, S, D)),
        "lm_head": rng.normal(size=(D, V)),
        "lm_head_bias": rng.normal(size=V),
        "mtp_hidden_states": rng.normal(size=(2, B, S, D)),
    }
    arrays = {k: v.astype(dtype) for k, v in arrays.items()}
    weights = rng.random((B, S), np.float32)
    weights[0, 3] = 0.0
    integers = {
        "targets": rng.integers(0, 5, (B, S), np.int32),
        "segment_ids": np.array([[1] * 6 + [2] * 5, [1] * 9 + [0] * 2], np.int32),
        "attention_mask": weights,
    }
    return jax.device_put((arrays, integers))


@functools.cache
def program(fused, **options):
    """Returns the jitted loss, aux, state and gradients of one of the paths."""
    loss_fn = ava_jax.create_unified_loss(EVERYTHING, **options)
    state = loss_fn.init()

    def loss(arrays: dict[str, Any], integers: dict[str, Any]):
        given = dict(arrays)
        if not fused:
            hidden, bias = given.pop("hidden_states"), given.pop("lm_head_bias")
            product = jnp.einsum(
                "bsd,dv->bsv",
                hidden,
                given["lm_head"],
                preferred_element_type=jnp.float32,
            )
            given["logits"] = product + bias.astype(jnp.float32)
            given["lm_head_bias"] = bias
        total, aux, after = loss_fn(state, **given, **integers)
        return total, (aux, after)

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def run(arrays, integers, fused, **options):
    """Returns the values of `program` by name."""
    (total, (aux, after)), grads = program(fused, **options)(arrays, integers)
    return {"loss": total, "aux": aux, "state": after, "grads": grads}


@functools.cache
def whole_logits(scale):
    """Returns the expected results: the logits path, whole rows at a time."""
    return run(*batch(scale), fused=False, block_size=S)


@pytest.mark.parametrize("scale", [0.05, 1.0])
@pytest.mark.parametrize("chunk", [None, 1, S // 2 + 1, S - 1, S, S + 5])
def test_both_paths_agree_with_every_term_on(chunk, scale):
    got = run(*batch(scale), fused=True, chunk_size=chunk)
    assert_trees_close(got, whole_logits(scale), 2e-5)


@pytest.mark.parametrize("scale", [0.05, 30.0])
@pytest.mark.parametrize("block", [1, S // 2 + 1, S - 1, S + 5])
@pytest.mark.parametrize("fused", [False, True])
def test_block_sizes_change_nothing(fused, block, scale):
    got = run(*batch(scale), fused=fused, chunk_size=7, block_size=block)
    assert_trees_close(got, whole_logits(scale), 2e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_an_accelerator_computes_the_same(fused):
    """Other sizes, and ids compared with every class instead of scattered."""
    got = run(*batch(), fused=fused, implementation="xla")
    assert_trees_close(got, whole_logits(1.0), 2e-5)


def test_tokens_of_two_chunks_are_summed_once():
    """A token that is summed twice would add log V at this scale."""
    got = run(*batch(0.01), fused=True, chunk_size=4)
    assert_trees_close(got["aux"]["nll"], whole_logits(0.01)["aux"]["nll"], 1e-6)


def test_bfloat16_operands_keep_a_float32_loss():
    arrays, integers = batch(dtype=jnp.bfloat16)
    want = run(arrays, integers, fused=False)
    got = run(arrays, integers, fused=True)
    assert got["loss"].dtype == jnp.float32
    assert_trees_close(got["loss"], want["loss"], 2e-6)
    assert {k: v.dtype for k, v in got["grads"].items()} == dict.fromkeys(
        arrays, jnp.bfloat16
    )
    assert_trees_close(got["grads"], want["grads"], 2e-2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_loss_is_that_of_float64_on_the_same_inputs(dtype):
    """Products accumulate in float32, also with shorter operands."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 64, 96)).astype(dtype)
    kernel = (rng.normal(size=(96, 1000)) / 10).astype(dtype)
    targets = rng.integers(0, 1000, (2, 64), np.int32)
    loss_fn = ava_jax.create_unified_loss(vocab_size=1000, use_ngram_penalty=False)
    _, aux, _ = jax.jit(loss_fn)(
        loss_fn.init(), targets=targets, hidden_states=hidden, lm_head=kernel
    )
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    log_z = np.log(np.exp(z).sum(-1))
    picked = np.take_along_axis(z, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(aux["nll"], (log_z - picked).mean(), rtol=2e-6)


AUX_KEYS = ("nll", "main_loss", "ngram_penalty", "mtp_loss")


@functools.cache
def gradient_of(key):
    """Returns the gradient of an aux entry alone, from hidden states."""
    arrays, integers = batch()
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    state = loss_fn.init()

    def entry(arrays: dict[str, Any]):
        return loss_fn(state, **arrays, **integers)[1][key]

    return jax.jit(jax.grad(entry))(arrays)


@functools.cache
def gradients_from_logits():
    """Returns the gradients of `AUX_KEYS` by name, from the logits as one array."""
    arrays, integers = batch()
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    state = loss_fn.init()

    def entries(arrays: dict[str, Any]):
        given = dict(arrays)
        hidden, bias = given.pop("hidden_states"), given["lm_head_bias"]
        logits = hidden @ given["lm_head"] + bias
        aux = loss_fn(state, logits=logits, **given, **integers)[1]
        return jnp.stack([aux[key] for key in AUX_KEYS])

    @jax.jit
    def pull(arrays: dict[str, Any], cotangent):
        return jax.vjp(entries, arrays)[1](cotangent)[0]

    one_hot = np.eye(len(AUX_KEYS), dtype=np.float32)
    return {key: pull(arrays, one_hot[i]) for i, key in enumerate(AUX_KEYS)}


@pytest.mark.parametrize("key", AUX_KEYS)
def test_the_gradient_of_an_aux_entry_is_exact(key):
    got, want = gradient_of(key), gradients_from_logits()[key]
    assert any(np.abs(np.asarray(g)).max() > 1e-3 for g in want.values())
    assert_trees_close(got, want, 2e-5)


def test_the_loss_and_an_aux_entry_may_be_differentiated_together():
    arrays, integers = batch()
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    state = loss_fn.init()

    def value(arrays: dict[str, Any]):
        loss, aux, _ = loss_fn(state, **arrays, **integers)
        # The loss has no part of nll, but of the main loss.
        return 2.0 * loss + 3.0 * aux["nll"] + 5.0 * aux["main_loss"]

    got = jax.jit(jax.grad(value))(arrays)
    parts = (
        run(arrays, integers, fused=True)["grads"],
        gradient_of("nll"),
        gradient_of("main_loss"),
    )
    want = jax.tree.map(
        lambda *g: np.tensordot([2, 3, 5], np.asarray(g, np.float64), 1), *parts
    )
    assert_trees_close(got, want, 1e-5)


def test_a_scaled_loss_has_a_scaled_gradient():
    arrays, integers = batch()
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    state = loss_fn.init()

    @jax.jit
    @jax.grad
    def gradient(arrays: dict[str, Any], factor):
        return factor * loss_fn(state, **arrays, **integers)[0]

    once, thrice = (gradient(arrays, factor) for factor in (1.0, 3.0))
    want = {k: 3 * np.asarray(g) for k, g in once.items()}
    assert_trees_close(thrice, want, 1e-6)


def largest_over_the_vocabulary(config, arrays, integers):
    """Returns the size of the largest array with a V axis in the compiled gradient."""
    loss_fn = ava_jax.create_unified_loss(config)
    state = loss_fn.init()

    def loss(arrays: dict[str, Any]):
        return loss_fn(state, **arrays, **integers)[0]

    program = jax.jit(jax.value_and_grad(loss)).lower(arrays).compile()
    found = re.findall(r"[a-z]+\d*\[([\d,]+)\]", str(program.as_text()))
    shapes = [tuple(map(int, dims.split(","))) for dims in found]
    return max(np.prod(shape) for shape in shapes if V in shape)


@pytest.mark.usefixtures("optimized_text")
def test_no_array_of_tokens_times_vocabulary_exists():
    largest = largest_over_the_vocabulary({**EVERYTHING, "chunk_size": 2}, *batch())
    assert largest < B * S * V
    assert max(2 * B * V, D * V) <= largest


@pytest.mark.usefixtures("optimized_text")
def test_parallel_heads_never_hold_their_logits():
    config = {**EVERYTHING, "mtp_type": "parallel", "hidden_size": D, "chunk_size": 2}
    arrays, integers = batch()
    del arrays["mtp_hidden_states"]
    arrays["mtp_params"] = {
        "norm": {"scale": jnp.ones(D), "bias": jnp.zeros(D)},
        "heads": {"kernel": jnp.ones((2, D, V)), "bias": jnp.zeros((2, V))},
    }
    assert largest_over_the_vocabulary(config, arrays, integers) < B * S * V


def parallel_heads(heads: int, features: int, vocab: int):
    """Returns the loss of parallel heads alone, and its arrays."""
    rng = np.random.default_rng(0)
    arrays = {
        "hidden_states": rng.normal(size=(2, 32, features)),
        "lm_head": rng.normal(size=(features, vocab)),
        "mtp_params": {
            "norm": {"scale": np.ones(features), "bias": np.zeros(features)},
            "heads": {
                "kernel": rng.normal(size=(heads, features, vocab)),
                "bias": rng.normal(size=(heads, vocab)),
            },
        },
    }
    arrays = jax.device_put(jax.tree.map(np.float32, arrays))
    targets = jax.device_put(rng.integers(0, vocab, (2, 32), np.int32))
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=vocab,
        hidden_size=features,
        use_mtp=True,
        mtp_type="parallel",
        num_future_tokens=heads,
        use_ngram_penalty=False,
        chunk_size=4,
        block_size=4,
    )
    state = loss_fn.init()

    def loss(arrays: dict[str, Any], name: str = "total_loss"):
        return loss_fn(state, targets=targets, **arrays)[1][name]

    return loss, arrays


def test_each_parallel_head_writes_its_gradient_to_its_place():
    def temporaries(heads: int) -> int:
        loss, arrays = parallel_heads(heads, features=64, vocab=1024)
        program = jax.jit(jax.value_and_grad(loss)).lower(arrays).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    matrix = 64 * 1024 * 4
    assert temporaries(12) - temporaries(4) < matrix


def test_the_loss_of_parallel_heads_in_aux_has_the_gradient_of_the_loss():
    loss, arrays = parallel_heads(3, features=6, vocab=23)

    whole, own = (
        jax.jit(jax.grad(functools.partial(loss, name=name)))(arrays)["mtp_params"]
        for name in ("total_loss", "mtp_loss")
    )
    assert_trees_close(own, whole, 1e-6)
    assert np.all(np.any(np.asarray(whole["heads"]["kernel"]), (1, 2)))


def test_the_gradient_costs_six_and_the_value_two():
    config = {**EVERYTHING, "use_mtp": False, "chunk_size": S}
    arrays, integers = batch()
    del arrays["mtp_hidden_states"]
    loss_fn = ava_jax.create_unified_loss(config)
    state = loss_fn.init()

    def loss(arrays: dict[str, Any]):
        return loss_fn(state, **arrays, **integers)[0]

    unit = B * S * D * V
    assert dot_flops(jax.make_jaxpr(loss)(arrays).jaxpr) == 2 * unit
    with_grad = jax.make_jaxpr(jax.grad(loss))(arrays).jaxpr
    assert dot_flops(with_grad) == 6 * unit


@pytest.mark.usefixtures("optimized_text")
def test_the_compiled_program_multiplies_no_more_than_that():
    hidden, kernel = np.ones((2, 64, 32), np.float32), np.ones((32, 256), np.float32)
    targets = jnp.ones((2, 64), jnp.int32)
    loss_fn = ava_jax.create_unified_loss(vocab_size=256, chunk_size=16, block_size=4)
    state = loss_fn.init()

    def loss(hidden, kernel):
        return loss_fn(state, targets=targets, hidden_states=hidden, lm_head=kernel)[0]

    def flops(f):
        program = jax.jit(f).lower(hidden, kernel).compile()
        return compiled_dot_flops(str(program.as_text()))

    unit = 2 * 64 * 32 * 256
    assert 2 * unit <= flops(loss) <= 2.05 * unit
    assert 6 * unit <= flops(jax.grad(loss, argnums=(0, 1))) <= 6.1 * unit

"""The head modules as NNX modules."""

import functools
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from support.head_checks import B, CausalBlock, D, K, S, V, adaptive, apply, normal

import ava_jax
from ava_jax.heads import ConfidenceGate, MTPHeads, NNXHeads, SequentialMTP

Inputs = dict[str, Any]
SHAPE = jax.ShapeDtypeStruct((1, 1, D), jnp.float32)


def positional(count: int) -> list[jax.Array]:
    return [normal(B, S, D, seed=i) for i in range(count)]


MODULES: dict[str, tuple[nn.Module, int, Inputs]] = {
    "linear": (MTPHeads(K, V), 1, {}),
    "mlp": (MTPHeads(K, V, "mlp", intermediate_size=5), 1, {}),
    "gate": (ConfidenceGate((5,), use_attention_pooling=True), 1, {}),
    "adaptive": (adaptive(confidence_threshold=0.0, warmup_steps=2), 1, {"step": 2}),
    "sequential": (SequentialMTP(2, CausalBlock), 2, {}),
}


def made(name: str) -> tuple[NNXHeads, list[jax.Array], Inputs]:
    """Made from the inputs' widths alone, under jit."""
    module, count, kwargs = MODULES[name]

    @nnx.jit
    def heads() -> NNXHeads:
        return NNXHeads(module, *[SHAPE] * count, rngs=nnx.Rngs(0), **kwargs)

    return heads(), positional(count), kwargs


def loss_of(output: Any) -> jax.Array:
    floats = [
        x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)
    ]
    return sum((jnp.mean(jnp.square(x - 0.3)) for x in floats), jnp.zeros(()))


@pytest.mark.parametrize("name", MODULES)
def test_the_state_is_linens_parameters_and_nothing_else(name: str) -> None:
    module, count, kwargs = MODULES[name]
    key = nnx.Rngs(0).params()
    want = jax.jit(functools.partial(module.init, **kwargs))(key, *positional(count))
    heads, _, _ = made(name)
    chex.assert_trees_all_close(heads.params, want["params"], rtol=1e-6)
    assert nnx.to_pure_dict(nnx.state(heads)).keys() == want["params"].keys()
    kinds = {type(x) for _, x in nnx.to_flat_state(nnx.state(heads))}
    assert kinds == {nnx.Param}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_in_nnx_equal_those_in_linen(name: str) -> None:
    heads, arrays, kwargs = made(name)

    def linen_loss(params: Any) -> jax.Array:
        return loss_of(apply(MODULES[name][0], {"params": params}, *arrays, **kwargs))

    @nnx.jit
    @nnx.value_and_grad
    def nnx_loss(heads: NNXHeads) -> jax.Array:
        return loss_of(heads(*arrays, **kwargs))

    value, grads = nnx_loss(heads)
    want_value, want = jax.jit(jax.value_and_grad(linen_loss))(heads.params)
    got = nnx.to_pure_dict(grads)
    chex.assert_trees_all_close((value, got), (want_value, want), rtol=1e-4, atol=1e-6)
    assert max(np.abs(x).max() for x in jax.tree.leaves(got)) > 1e-3


@pytest.mark.parametrize("name", MODULES)
def test_train_steps_in_nnx_lower_the_loss(name: str) -> None:
    heads, arrays, kwargs = made(name)
    optimizer = nnx.Optimizer(heads, optax.sgd(0.1), wrt=nnx.Param)

    traces = []

    @nnx.jit
    def train_step(
        heads: NNXHeads, optimizer: nnx.Optimizer, step: jax.Array
    ) -> jax.Array:
        traces.append(step)
        extra = {"step": step} if "step" in kwargs else {}
        loss, grads = nnx.value_and_grad(lambda m: loss_of(m(*arrays, **extra)))(heads)
        optimizer.update(heads, grads)
        return loss

    # From step 2, where the warm-up of the adaptive heads ends.
    losses = [
        float(train_step(heads, optimizer, jax.device_put(2 + i))) for i in range(8)
    ]
    assert losses[-1] < losses[0] * 0.99
    assert len(traces) == 1


class Model(nnx.Module):
    """An embedding, a head, and the heads as one more layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(V, D, rngs=rngs)
        self.head = nnx.Linear(D, V, rngs=rngs)
        self.mtp = NNXHeads(MTPHeads(K, V), SHAPE, rngs=rngs)


def test_created_split_and_used_as_a_layer() -> None:
    graphdef, params = nnx.split(Model(nnx.Rngs(0)), nnx.Param)
    config = {"vocab_size": V, "hidden_size": D, "use_mtp": True}
    loss_fn = ava_jax.create_unified_loss(config, num_future_tokens=K)
    ids = jax.device_put(np.random.default_rng(0).integers(0, V, (B, S)))

    @jax.jit
    @jax.value_and_grad
    def step(params: nnx.State) -> jax.Array:
        model = nnx.merge(graphdef, params)
        hidden = model.embed(ids)
        return loss_fn(
            loss_fn.init(),
            targets=jnp.roll(ids, -1, 1),
            logits=model.head(hidden),
            hidden_states=hidden,
            mtp_params=model.mtp.params,
        )[1]["mtp_loss"]

    loss, grads = step(params)
    again = Model(nnx.Rngs(0))

    @jax.jit
    def nll_of_heads(params: nnx.State) -> list[jax.Array]:
        nll = optax.softmax_cross_entropy_with_integer_labels
        logits = again.mtp(nnx.merge(graphdef, params).embed(ids))
        targets = jnp.roll(ids, -1, 1)
        heads = range(1, K + 1)
        return [nll(logits[j - 1, :, :-j], targets[:, j:]).mean() for j in heads]

    assert loss == pytest.approx(0.1 * np.mean(nll_of_heads(params)), rel=1e-5)
    assert all(np.abs(x).max() > 1e-5 for x in jax.tree.leaves(grads["mtp"]))


def test_checkpoints_of_linen_and_nnx_interchange(tmp_path: Path) -> None:
    module, h = MTPHeads(K, V), normal(B, S, D)
    linen = jax.jit(module.init)(jax.random.key(7), h)["params"]
    heads = NNXHeads(module, h, rngs=nnx.Rngs(0))
    own = heads.params
    assert np.abs(own["heads"]["kernel"] - linen["heads"]["kernel"]).max() > 0.1
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "nnx", own)
        checkpointer.save(tmp_path / "linen", linen)
        checkpointer.wait_until_finished()
        nnx.update(heads, checkpointer.restore(tmp_path / "linen", own))
        restored = checkpointer.restore(tmp_path / "nnx", linen)
    chex.assert_trees_all_equal(heads.params, linen)
    chex.assert_trees_all_equal(heads(h), module.apply({"params": linen}, h))
    chex.assert_trees_all_equal(restored, own)


def test_dropout_takes_its_keys_from_the_call() -> None:
    module, h = MTPHeads(K, V, "mlp", dropout_rate=0.5), normal(B, S, D)
    heads, rngs = NNXHeads(module, h, rngs=nnx.Rngs(0)), nnx.Rngs(dropout=1)
    first, second = (heads(h, deterministic=False, rngs=rngs) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    again = heads(h, deterministic=False, rngs=nnx.Rngs(dropout=1))
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(heads(h), heads(h, rngs=rngs))
    with pytest.raises(Exception, match="dropout"):
        heads(h, deterministic=False)


def test_parameters_take_the_stream_named_for_them() -> None:
    module = MTPHeads(K, V)
    named = NNXHeads(module, SHAPE, rngs=nnx.Rngs(5, params=0, dropout=1)).params
    chex.assert_trees_all_equal(named, made("linear")[0].params)
    other = NNXHeads(module, SHAPE, rngs=nnx.Rngs(5)).params
    assert np.abs(named["heads"]["kernel"] - other["heads"]["kernel"]).max() > 0.1


class Block(nnx.Module):
    """A block of an NNX model; it sums over the past."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        past = jnp.cumsum(x, axis=1)
        for layer in self.layers:
            past = layer(past)
        return x + self.dropout(past, deterministic=deterministic)


def test_sequential_depths_take_an_nnx_block() -> None:
    block = functools.partial(nnx.bridge.ToLinen, Block, args=(D,))
    mtp = NNXHeads(SequentialMTP(2, block), SHAPE, SHAPE, rngs=nnx.Rngs(0))
    h, e = positional(2)
    out = nnx.jit(lambda mtp: mtp(h, e))(mtp)
    first, _ = mtp(1, h, jnp.roll(e, -1, 1), method=SequentialMTP.depth)
    np.testing.assert_allclose(out[0, :, :-1], first[:, :-1], rtol=1e-5, atol=1e-6)
    # By hand: the block of depth 1 on its projected input.
    params: Any = mtp.params
    with_own = Block(D, nnx.Rngs(3))
    nnx.update(with_own, params["block_1"])
    rms = [x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) for x in (h, e)]
    pair = jnp.concatenate([rms[0], jnp.roll(rms[1], -1, 1)], -1)
    by_hand = with_own(pair @ params["project_1"]["kernel"])
    np.testing.assert_allclose(first, by_hand, rtol=1e-4, atol=1e-5)


class Sharded(nn.Module):
    """A block that names the axes of its kernel."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        return nn.Dense(x.shape[-1], kernel_init=init)(x)


def test_names_of_axes_stay() -> None:
    mesh = jax.make_mesh((2,), ("model",), (jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        module = SequentialMTP(1, Sharded)
        mtp = NNXHeads(module, SHAPE, SHAPE, rngs=nnx.Rngs(0))
        specs: Any = nnx.to_pure_dict(nnx.get_partition_spec(nnx.state(mtp)))
        assert specs["block_1"]["Dense_0"]["kernel"] == jax.P(None, "model")
        assert mtp(*positional(2)).shape == (1, B, S, D)


class Counts(nn.Module):
    """A block with a variable that is no parameter."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=True)(x)


def test_variables_that_are_no_parameters_are_an_error() -> None:
    message = r"module must have parameters only, got SequentialMTP .*batch_stats"
    with pytest.raises(ValueError, match=message):
        NNXHeads(SequentialMTP(1, Counts), SHAPE, SHAPE, rngs=nnx.Rngs(0))

"""The programs of `benchmarks.compiled`: baselines and this package's candidates."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ava_jax
from benchmarks import baselines, candidates, external, posttraining
from benchmarks.posttraining import Loss, Rollout
from benchmarks.shapes import Shape
from benchmarks.topologies import CHIPS, devices, given, make_mesh

NAIVE = "naive"
NAIVE_FORWARD = "naive, forward only"
OPTAX = "optax, from logits"
FLOOR = "three bare matmuls"
DEPTHS = 3
# The mesh axes of rows and of the vocabulary.
ROW_AXES = ("data", "fsdp")
VOCAB_AXIS = "tensor"

Kind = Literal["baseline", "candidate"]


class Entry(NamedTuple):
    """A function to compile.

    Attributes:
      name: unique in a table.
      kind: whether it is a baseline or this package's.
      function: of the arguments; a loss if it has gradients.
      arguments: the shapes of its arrays.
      gradients: the indices of the arguments that it is differentiated by.
      reference: the baseline that it is compared with.
    """

    name: str
    kind: Kind
    function: Callable[..., Any]
    arguments: tuple[jax.ShapeDtypeStruct, ...]
    gradients: tuple[int, ...] = ()
    reference: str = NAIVE

    @property
    def step(self) -> Callable[..., Any]:
        """The function, with its gradients if it has any."""
        if not self.gradients:
            return self.function
        return jax.value_and_grad(self.function, argnums=self.gradients)

    def out_shardings(self) -> Any:
        """Returns the arguments' shardings for the gradients on a mesh; else None."""
        first = self.arguments[0].sharding
        if not self.gradients or not isinstance(first, NamedSharding):
            return None
        shardings = tuple(self.arguments[i].sharding for i in self.gradients)
        return NamedSharding(first.mesh, P()), shardings


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of arrays: one device of a chip, or a mesh.

    Attributes:
      chip: a name of `benchmarks.topologies.CHIPS`.
      mesh: `None` for one device.
    """

    chip: str
    mesh: Mesh | None = None

    @property
    def are_gpus(self) -> bool:
        """Whether they are GPUs, for which the package has a kernel of its own."""
        return CHIPS[self.chip].platform == "cuda"

    def sharding(self, *axes: str | tuple[str, ...] | None) -> Sharding:
        """Returns the sharding of an array over those axes that the mesh has."""
        if self.mesh is None:
            return SingleDeviceSharding(devices(self.chip)[0])
        return NamedSharding(self.mesh, P(*map(self._known, axes)))

    def options(self) -> dict[str, Any]:
        """Returns the loss's mesh arguments."""
        if self.mesh is None:
            return {}
        return {
            "mesh": self.mesh,
            "batch_axes": self._known(ROW_AXES),
            "vocab_axis": self._known(VOCAB_AXIS),
        }

    def _known(self, axes: str | tuple[str, ...] | None) -> Any:
        names = () if self.mesh is None else self.mesh.axis_names
        if isinstance(axes, tuple):
            return tuple(name for name in axes if name in names)
        return axes if axes in names else None


def devices_of(chip: str, sizes: Mapping[str, int] | None = None) -> Devices:
    """Returns one device of a chip, or a mesh of the given axis sizes."""
    return Devices(chip, make_mesh(chip, sizes) if sizes else None)


# Losses --------------------------------------------------------------------------


def plain(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Returns the config of the cross-entropy alone."""
    return candidates.plain(vocab)


def everything(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Returns the default config with early EOS and z-loss."""
    return ava_jax.UnifiedLossConfig(
        vocab_size=vocab, eos_token_id=vocab - 1, z_loss_weight=1e-4
    )


CONFIGS = {"plain": plain, "everything": everything}


def loss_of(
    config: ava_jax.UnifiedLossConfig, target: Devices, *names: str
) -> Callable[..., jax.Array]:
    """Returns the package's loss as a function of the arguments `names`, in order."""
    loss_fn = ava_jax.unified_loss(config, **target.options())

    def loss(*arrays: Any) -> jax.Array:
        inputs: Any = dict(zip(names, arrays, strict=True))
        return loss_fn(loss_fn.init(), **inputs)[0]

    return loss


def _checkpointed(
    hidden: jax.Array, lm_head: jax.Array, targets: jax.Array
) -> jax.Array:
    return baselines.checkpointed(targets, hidden, lm_head)


def _optax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return baselines.optax_loss(targets, logits)


def _products(
    hidden: jax.Array, lm_head: jax.Array, dlogits: jax.Array
) -> tuple[jax.Array, ...]:
    dhead = jnp.einsum("bsd,bsv->dv", hidden, dlogits)
    return hidden @ lm_head, dlogits @ lm_head.T, dhead


def _of_rollout(loss: Loss) -> Callable[..., jax.Array]:
    def called(hidden: jax.Array, lm_head: jax.Array, *rollout: jax.Array) -> jax.Array:
        return loss(hidden, lm_head, Rollout(*rollout))

    return called


# Tables --------------------------------------------------------------------------


class Arrays(NamedTuple):
    """The shapes of a loss's inputs."""

    hidden: jax.ShapeDtypeStruct
    lm_head: jax.ShapeDtypeStruct
    targets: jax.ShapeDtypeStruct
    logits: jax.ShapeDtypeStruct


def arrays_of(shape: Shape, target: Devices) -> Arrays:
    """Returns the inputs of a shape, sharded like those of a model."""
    rows, dtype = (shape.batch, shape.length), shape.dtype
    return Arrays(
        given((*rows, shape.width), dtype, target.sharding(ROW_AXES)),
        given((shape.width, shape.vocab), dtype, target.sharding("fsdp", VOCAB_AXIS)),
        given(rows, "int32", target.sharding(ROW_AXES)),
        given((*rows, shape.vocab), dtype, target.sharding(ROW_AXES, None, VOCAB_AXIS)),
    )


def entries(shape: Shape, target: Devices) -> Iterator[Entry]:
    """Yields the entries of a shape, each baseline before those compared with it."""
    arrays = arrays_of(shape, target)
    yield from _baselines(arrays, one_device=target.mesh is None)
    for name, config in CONFIGS.items():
        yield from _main_candidates(name, config(shape.vocab), arrays, target)
    if target.mesh is None:
        yield from _one_sided(plain(shape.vocab), arrays, target)
        for name, config in CONFIGS.items():
            yield _biased(name, config(shape.vocab), arrays, target)
        yield sequential_heads(shape, target)
        yield parallel_heads(shape, target)
    if target.are_gpus:
        yield from _by_xla(shape, arrays, target)


def _baselines(arrays: Arrays, *, one_device: bool) -> Iterator[Entry]:
    hidden, lm_head, targets, logits = arrays
    fused = hidden, lm_head, targets
    written = external.naive_baselines()
    for name, function in written.items():
        yield Entry(name, "baseline", function, fused, (0, 1))
    yield Entry(FLOOR, "baseline", _products, (hidden, lm_head, logits))
    if one_device:  # its scan would split the rows of all devices
        yield Entry("checkpointed scan", "baseline", _checkpointed, fused, (0, 1))
    yield Entry(NAIVE_FORWARD, "baseline", written[NAIVE], fused)
    yield Entry(OPTAX, "baseline", _optax, (logits, targets), (0,), OPTAX)
    for name, function in _external() if one_device else ():
        yield Entry(name, "baseline", function, fused, (0, 1))


def _external() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yields other packages' losses; prints which are not installed, and why."""
    found = external.find()
    for package, reason in found.skipped.items():
        print(f"without {package}: {reason}", flush=True)
    yield from found.baselines.items()


def _main_candidates(
    name: str, config: ava_jax.UnifiedLossConfig, arrays: Arrays, target: Devices
) -> Iterator[Entry]:
    hidden, lm_head, targets, logits = arrays
    fused = loss_of(config, target, "hidden_states", "lm_head", "targets")
    whole = loss_of(config, target, "logits", "targets")
    given_arrays = hidden, lm_head, targets
    yield Entry(name, "candidate", fused, given_arrays, (0, 1))
    named = f"{name}, from logits"
    yield Entry(named, "candidate", whole, (logits, targets), (0,), OPTAX)
    named = f"{name}, forward only"
    yield Entry(named, "candidate", fused, given_arrays, reference=NAIVE_FORWARD)


def _one_sided(
    config: ava_jax.UnifiedLossConfig, arrays: Arrays, target: Devices
) -> Iterator[Entry]:
    fused = loss_of(config, target, "hidden_states", "lm_head", "targets")
    for number, what in enumerate(("lm_head", "hidden states")):
        name = f"plain, {what} not differentiated"
        yield Entry(name, "candidate", fused, arrays[:3], (number,))


def _biased(
    name: str, config: ava_jax.UnifiedLossConfig, arrays: Arrays, target: Devices
) -> Entry:
    """Returns the loss of a head that has a bias."""
    hidden, lm_head, targets, _ = arrays
    names = "hidden_states", "lm_head", "lm_head_bias", "targets"
    loss = loss_of(config, target, *names)
    bias = given(lm_head.shape[1:], lm_head.dtype, target.sharding(VOCAB_AXIS))
    arguments = hidden, lm_head, bias, targets
    return Entry(f"{name}, with a bias", "candidate", loss, arguments, (0, 1, 2))


def _by_xla(shape: Shape, arrays: Arrays, target: Devices) -> Iterator[Entry]:
    """Yields the losses from hidden states without the kernel for GPUs."""
    for name, config in CONFIGS.items():
        own = dataclasses.replace(config(shape.vocab), implementation="xla")
        for entry in _main_candidates(name, own, arrays, target):
            if entry.reference != OPTAX:
                yield entry._replace(name=f"{entry.name}, by XLA")


def sequential_heads(shape: Shape, target: Devices, depths: int = DEPTHS) -> Entry:
    """Returns the plain loss with K sequential depths on the main head."""
    hidden, lm_head, targets, _ = arrays_of(shape, target)
    sharding = target.sharding(None, ROW_AXES)
    states = given((depths, *hidden.shape), shape.dtype, sharding)
    config = candidates.with_depths(plain(shape.vocab), depths)
    names = "hidden_states", "lm_head", "mtp_hidden_states", "targets"
    loss = loss_of(config, target, *names)
    arguments = hidden, lm_head, states, targets
    name = f"plain, sequential MTP, K={depths}"
    return Entry(name, "candidate", loss, arguments, (0, 1, 2))


def parallel_heads(shape: Shape, target: Devices, depths: int = DEPTHS) -> Entry:
    """Returns the plain loss with K parallel heads, each with a projection."""
    hidden, lm_head, targets, _ = arrays_of(shape, target)
    config = dataclasses.replace(
        plain(shape.vocab),
        use_mtp=True,
        mtp_type="parallel",
        num_future_tokens=depths,
        hidden_size=shape.width,
    )

    def parameter(*sizes: int) -> jax.ShapeDtypeStruct:
        return given(sizes, shape.dtype, target.sharding())

    width, vocab = shape.width, shape.vocab
    heads: Any = {
        "norm": {"scale": parameter(width), "bias": parameter(width)},
        "heads": {
            "kernel": parameter(depths, width, vocab),
            "bias": parameter(depths, vocab),
        },
    }
    loss = loss_of(config, target, "hidden_states", "lm_head", "mtp_params", "targets")
    arguments: Any = hidden, lm_head, heads, targets
    name = f"plain, parallel heads, K={depths}"
    return Entry(name, "candidate", loss, arguments, (0, 1, 2))


def posttraining_entries(shape: Shape, target: Devices) -> Iterator[Entry]:
    """Yields the entries of post-training for one device, baselines first."""
    hidden, lm_head, ids, _ = arrays_of(shape, target)
    numbers = given(ids.shape, "float32", target.sharding(ROW_AXES))
    # The rollout's targets, mask, advantages and old log-probabilities.
    arguments = hidden, lm_head, ids, ids, numbers, numbers
    by_xla = posttraining.by_xla() if target.are_gpus else {}
    for group in (posttraining.LOG_PROBS, posttraining.GRPO):
        for name, kind, loss in _of_group(group, by_xla):
            yield Entry(name, kind, loss, arguments, (0, 1), group[0])
    naive, _, own = posttraining.LOG_PROBS
    reference = f"{naive}, forward only"
    for name, kind, loss in _of_group((naive, own), by_xla):
        named = f"{name}, forward only"
        yield Entry(named, kind, loss, arguments, reference=reference)


def _of_group(
    names: Sequence[str], by_xla: Mapping[str, Loss]
) -> Iterator[tuple[str, Kind, Callable[..., jax.Array]]]:
    """Yields losses of rollouts, each followed by that without the kernel for GPUs."""
    for name in names:
        kind: Kind = "candidate" if name in posttraining.OWN else "baseline"
        yield name, kind, _of_rollout(posttraining.LOSSES[name])
        if name in by_xla:
            yield f"{name}, by XLA", "candidate", _of_rollout(by_xla[name])

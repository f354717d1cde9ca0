"""What `benchmarks.compiled` compiles: the baselines and this package's candidates."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import ava_jax
from benchmarks import external, rivals, subjects
from benchmarks.shapes import Shape
from benchmarks.topologies import devices, given, make_mesh

NAIVE = "naive"
NAIVE_FORWARD = "naive, forward only"
OPTAX = "optax, from logits"
FLOOR = "three bare matmuls"
DEPTHS = 3
# The axes of a mesh, by what lies along them.
ROW_AXES = ("data", "fsdp")
VOCAB_AXIS = "tensor"

Kind = Literal["baseline", "candidate"]


class Entry(NamedTuple):
    """A function that is compiled.

    Attributes:
      name: unique in a table.
      kind: whether it is this package's.
      function: of the arguments; a loss, or whatever else if it has no gradients.
      arguments: what stands for the arrays.
      gradients: the numbers of the arguments that it is differentiated for.
      reference: the baseline that it is held against.
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
        """On a mesh, gradients lie like their arguments; elsewhere XLA may choose."""
        first = self.arguments[0].sharding
        if not self.gradients or not isinstance(first, NamedSharding):
            return None
        places = tuple(self.arguments[i].sharding for i in self.gradients)
        return NamedSharding(first.mesh, P()), places


@dataclasses.dataclass(frozen=True)
class Place:
    """Where arrays lie: on one device of a chip, or on a mesh of many.

    Attributes:
      chip: a name of `benchmarks.topologies.CHIPS`.
      mesh: `None` for one device.
    """

    chip: str
    mesh: Mesh | None = None

    def sharding(self, *axes: str | tuple[str, ...] | None) -> Sharding:
        """The sharding of an array over the axes that the mesh has."""
        if self.mesh is None:
            return SingleDeviceSharding(devices(self.chip)[0])
        return NamedSharding(self.mesh, P(*map(self._known, axes)))

    def options(self) -> dict[str, Any]:
        """The arguments that tell the package of the mesh."""
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


def place_on(chip: str, sizes: Mapping[str, int] | None = None) -> Place:
    """Returns one device of a chip, or a mesh of the given axes."""
    return Place(chip, make_mesh(chip, sizes) if sizes else None)


# Losses --------------------------------------------------------------------------


def plain(vocab: int) -> ava_jax.UnifiedLossConfig:
    """Cross-entropy and nothing else."""
    return subjects.plain(vocab)


def everything(vocab: int) -> ava_jax.UnifiedLossConfig:
    """The defaults with early EOS and z-loss."""
    return ava_jax.UnifiedLossConfig(
        vocab_size=vocab, eos_token_id=vocab - 1, z_loss_weight=1e-4
    )


CONFIGS = {"plain": plain, "everything": everything}


def loss_of(
    config: ava_jax.UnifiedLossConfig, place: Place, *names: str
) -> Callable[..., jax.Array]:
    """Returns the package's loss as a function of the arguments `names`, in order."""
    loss_fn = ava_jax.unified_loss(config, **place.options())

    def loss(*arrays: Any) -> jax.Array:
        inputs: Any = dict(zip(names, arrays, strict=True))
        return loss_fn(loss_fn.init(), **inputs)[0]

    return loss


def _checkpointed(
    hidden: jax.Array, lm_head: jax.Array, targets: jax.Array
) -> jax.Array:
    return rivals.checkpointed(targets, hidden, lm_head)


def _optax(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return rivals.optax_loss(targets, logits)


def _products(
    hidden: jax.Array, lm_head: jax.Array, dlogits: jax.Array
) -> tuple[jax.Array, ...]:
    dhead = jnp.einsum("bsd,bsv->dv", hidden, dlogits)
    return hidden @ lm_head, dlogits @ lm_head.T, dhead


# Tables --------------------------------------------------------------------------


class Arrays(NamedTuple):
    """What stands for the inputs of a loss."""

    hidden: jax.ShapeDtypeStruct
    lm_head: jax.ShapeDtypeStruct
    targets: jax.ShapeDtypeStruct
    logits: jax.ShapeDtypeStruct


def arrays_of(shape: Shape, place: Place) -> Arrays:
    """Returns the inputs of a shape, sharded as a model's would be."""
    rows, dtype = (shape.batch, shape.length), shape.dtype
    return Arrays(
        given((*rows, shape.width), dtype, place.sharding(ROW_AXES)),
        given((shape.width, shape.vocab), dtype, place.sharding("fsdp", VOCAB_AXIS)),
        given(rows, "int32", place.sharding(ROW_AXES)),
        given((*rows, shape.vocab), dtype, place.sharding(ROW_AXES, None, VOCAB_AXIS)),
    )


def entries(shape: Shape, place: Place) -> Iterator[Entry]:
    """Yields what is compiled for a shape, each baseline before what is held to it."""
    arrays = arrays_of(shape, place)
    yield from _baselines(arrays, one_device=place.mesh is None)
    for name, config in CONFIGS.items():
        yield from _main_candidates(name, config(shape.vocab), arrays, place)
    if place.mesh is None:
        yield from _one_sided(plain(shape.vocab), arrays, place)
        yield sequential_heads(shape, place)
        yield parallel_heads(shape, place)


def _baselines(arrays: Arrays, *, one_device: bool) -> Iterator[Entry]:
    hidden, lm_head, targets, logits = arrays
    fused = hidden, lm_head, targets
    written = external.naive_baselines()
    for name, function in written.items():
        yield Entry(name, "baseline", function, fused, (0, 1))
    yield Entry(FLOOR, "baseline", _products, (hidden, lm_head, logits))
    if one_device:  # its scan would cut through the rows of all devices
        yield Entry("checkpointed scan", "baseline", _checkpointed, fused, (0, 1))
    yield Entry(NAIVE_FORWARD, "baseline", written[NAIVE], fused)
    yield Entry(OPTAX, "baseline", _optax, (logits, targets), (0,), OPTAX)
    for name, function in _external() if one_device else ():
        yield Entry(name, "baseline", function, fused, (0, 1))


def _external() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Other packages' losses; says which are not there, and why."""
    found = external.find()
    for package, reason in found.skipped.items():
        print(f"without {package}: {reason}", flush=True)
    yield from found.baselines.items()


def _main_candidates(
    name: str, config: ava_jax.UnifiedLossConfig, arrays: Arrays, place: Place
) -> Iterator[Entry]:
    hidden, lm_head, targets, logits = arrays
    fused = loss_of(config, place, "hidden_states", "lm_head", "targets")
    whole = loss_of(config, place, "logits", "targets")
    given_arrays = hidden, lm_head, targets
    yield Entry(name, "candidate", fused, given_arrays, (0, 1))
    named = f"{name}, from logits"
    yield Entry(named, "candidate", whole, (logits, targets), (0,), OPTAX)
    named = f"{name}, forward only"
    yield Entry(named, "candidate", fused, given_arrays, reference=NAIVE_FORWARD)


def _one_sided(
    config: ava_jax.UnifiedLossConfig, arrays: Arrays, place: Place
) -> Iterator[Entry]:
    fused = loss_of(config, place, "hidden_states", "lm_head", "targets")
    for number, what in enumerate(("lm_head", "hidden states")):
        name = f"plain, {what} not differentiated"
        yield Entry(name, "candidate", fused, arrays[:3], (number,))


def sequential_heads(shape: Shape, place: Place, depths: int = DEPTHS) -> Entry:
    """Returns the plain loss with K sequential depths on the main head."""
    hidden, lm_head, targets, _ = arrays_of(shape, place)
    states = given((depths, *hidden.shape), shape.dtype, place.sharding(None, ROW_AXES))
    config = subjects.with_depths(plain(shape.vocab), depths)
    names = "hidden_states", "lm_head", "mtp_hidden_states", "targets"
    loss = loss_of(config, place, *names)
    arguments = hidden, lm_head, states, targets
    name = f"plain, sequential MTP, K={depths}"
    return Entry(name, "candidate", loss, arguments, (0, 1, 2))


def parallel_heads(shape: Shape, place: Place, depths: int = DEPTHS) -> Entry:
    """Returns the plain loss with K parallel heads, each with a projection."""
    hidden, lm_head, targets, _ = arrays_of(shape, place)
    config = dataclasses.replace(
        plain(shape.vocab),
        use_mtp=True,
        mtp_type="deepseek",
        num_future_tokens=depths,
        hidden_size=shape.width,
    )

    def parameter(*sizes: int) -> jax.ShapeDtypeStruct:
        return given(sizes, shape.dtype, place.sharding())

    width, vocab = shape.width, shape.vocab
    heads: Any = {
        "norm": {"scale": parameter(width), "bias": parameter(width)},
        "heads": {
            "kernel": parameter(depths, width, vocab),
            "bias": parameter(depths, vocab),
        },
    }
    loss = loss_of(config, place, "hidden_states", "lm_head", "mtp_params", "targets")
    arguments: Any = hidden, lm_head, heads, targets
    name = f"plain, parallel heads, K={depths}"
    return Entry(name, "candidate", loss, arguments, (0, 1, 2))

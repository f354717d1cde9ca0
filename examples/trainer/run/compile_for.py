"""Compiles a training step for TPUs that need not be there, and says what it needs.

The step is the trainer's own, given shapes in place of arrays: nothing is allocated.
Memory and collectives are facts of the compiled program. Times are estimates: the
compiler's of the cycles, and bytes over bandwidth of the communication.
"""

import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

import ava_jax
from trainer.errors import TrainingError
from trainer.model.language_model import LanguageModel, is_adaptive
from trainer.model.layers import Batch
from trainer.report.metrics import Metrics
from trainer.run.devices import ROWS, loss_on, make_mesh
from trainer.run.program import Program, read_program
from trainer.run.settings import Settings
from trainer.run.state import TrainState, make_model, state_shapes

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a kind of TPU can do.

    Attributes:
      memory: bytes of HBM that the compiler lets a program have.
      flops: of bfloat16 products, a second.
      clock: cycles a second.
      bandwidth: bytes a second that a device sends along one axis of the network, in
        both directions.
    """

    memory: float
    flops: float
    clock: float
    bandwidth: float


# From the vendor's data sheets; HBM as the compiler reports it. A chip of tpu7x is two
# devices, and its clock follows from its flops, at 2¹⁹ a cycle and device.
CHIPS = {
    "v5e": Chip(15.75 * GIB, 1.97e14, 1.5e9, 9e10),
    "v5p": Chip(95.74 * GIB, 4.59e14, 1.75e9, 1.8e11),
    "v6e": Chip(31.25 * GIB, 9.18e14, 1.75e9, 1.8e11),
    "tpu7x": Chip(94.75 * GIB, 1.155e15, 2.2e9, 1.8e11),
}

# The compiler is asked for another machine's program, so it looks for none of its own.
# It takes no device either, so that others may use those that there are.
ALONE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


MakeTrainStep = Callable[
    [Settings, LanguageModel, ava_jax.UnifiedLoss, Mesh],
    Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
]


class Plan(NamedTuple):
    """A jitted step and its arguments, as shapes with shardings."""

    step: jax.stages.Wrapped
    state: TrainState
    batch: Batch


class Flops(NamedTuple):
    """Flops of a step over all devices, without those of recomputing."""

    model: float
    loss: float


class Report(NamedTuple):
    """What is known of a compiled step.

    Attributes:
      chip: that it was compiled for.
      devices: how many of them.
      tokens: of a batch.
      memory: bytes of a device by kind, and their sum as "total".
      flops: of a step.
      program: what the compiled text says.
    """

    chip: Chip
    devices: int
    tokens: int
    memory: dict[str, float]
    flops: Flops
    program: Program

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory["total"] <= self.chip.memory

    @property
    def computation(self) -> float:
        """Seconds of a step, by the compiler's estimate; 0 where it gives none."""
        return self.program.cycles / self.chip.clock

    @property
    def communication(self) -> float:
        """Seconds that the bytes take along one axis of the network."""
        return self.program.sent / self.chip.bandwidth

    @property
    def seconds(self) -> float:
        """Seconds of a step in which computation and communication do not overlap."""
        return self.computation + self.communication

    @property
    def utilisation(self) -> float:
        """The share of the devices' flops that a step makes use of."""
        peak = self.devices * self.chip.flops
        return sum(self.flops) / (self.seconds * peak)


def compile_for(
    settings: Settings,
    loss: ava_jax.UnifiedLossConfig,
    make_train_step: MakeTrainStep,
    console: Console,
) -> None:
    """Compiles the step for `settings.compile_for` and prints what it needs.

    Raises:
      TrainingError: the compiler is missing, or the step does not fit into memory.
      ValueError: there is no such topology, or the mesh does not fit it.
    """
    chip, devices = find_devices(settings.compile_for)
    mesh = make_mesh(
        settings.mesh, settings.batch_size // settings.microbatches, devices
    )
    plan = make_plan(settings, loss, make_train_step, mesh)
    axes = ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    console.print(
        f"{settings.preset} on {len(devices)} devices of {settings.compile_for}, "
        f"{axes}; {settings.batch_size} rows of {settings.sequence_length} tokens in "
        f"{settings.microbatches} micro-batches; {settings.dtype}",
        highlight=False,
        soft_wrap=True,
    )
    start = time.monotonic()
    compiled = compile_plan(plan, chip)
    seconds = time.monotonic() - start
    report = make_report(settings, loss, plan, compiled, chip, len(devices))
    show(report, console)
    console.print(f"compiled in {seconds:.0f} s", highlight=False)
    if not report.fits:
        raise TrainingError(f"the step does not fit into memory: {ADVICE}")


def make_plan(
    settings: Settings,
    loss: ava_jax.UnifiedLossConfig,
    make_train_step: MakeTrainStep,
    mesh: Mesh,
) -> Plan:
    """Returns the step and its arguments as shapes, for a compiler without a device."""
    model, loss_fn = make_model(settings, loss), loss_on(mesh, loss)
    shape = settings.batch_size, settings.sequence_length
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))
    rows = cast(Array, jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding))
    step = cast(jax.stages.Wrapped, make_train_step(settings, model, loss_fn, mesh))
    state = state_shapes(settings, model, loss_fn, mesh)
    return Plan(step, state, Batch(*[rows] * 4))


ADVICE = (
    "more devices along fsdp or tensor, fewer rows in a micro-batch, or --model.remat "
    "need less of it"
)


def find_devices(topology: str) -> tuple[Chip, Sequence[object]]:
    """Returns the chip of a topology such as `v5p:2x2x1`, and its devices.

    Raises:
      TrainingError: the compiler of TPUs is not installed.
      ValueError: there is no such topology.
    """
    chip = CHIPS.get(topology.partition(":")[0])
    if chip is None or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise ValueError(
            "--compile-for takes a kind of chip and how many lie along each axis, such "
            f"as v5e:2x2 or v5p:4x4x4, of {', '.join(CHIPS)}; got {topology!r}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise TrainingError(
            "--compile-for needs the compiler of TPUs: pip install 'jax[tpu]'"
        )
    os.environ.update({k: v for k, v in ALONE.items() if k not in os.environ})
    # The devices of this machine, if it has any, are left alone.
    jax.config.update("jax_platforms", "cpu")
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"there is no --compile-for {topology}: {error}") from error
    return chip, found.devices


def compile_plan(plan: Plan, chip: Chip) -> jax.stages.Compiled:
    """Compiles a step for the devices that its arguments lie on.

    Raises:
      TrainingError: the compiler says that it needs more memory than there is.
    """
    platform = next(iter(plan.batch.inputs.sharding.device_set)).platform
    lowered = plan.step.trace(plan.state, plan.batch).lower(
        lowering_platforms=(platform,)
    )
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        parts = (
            bytes_of(part) / GIB for part in (plan.state.params, plan.state.optimizer)
        )
        held = "parameters take {:.2f} GiB and the optimizer {:.2f}".format(*parts)
        said = str(error).removeprefix("RESOURCE_EXHAUSTED: ").partition("\n")[0]
        raise TrainingError(
            f"the step does not fit into the {chip.memory / GIB:.2f} GiB of a device, "
            f"where {held}: {ADVICE}. The compiler says: {said}"
        ) from error


def make_report(
    settings: Settings,
    loss: ava_jax.UnifiedLossConfig,
    plan: Plan,
    compiled: jax.stages.Compiled,
    chip: Chip,
    devices: int,
) -> Report:
    """Reads what a compiled step needs."""
    return Report(
        chip=chip,
        devices=devices,
        tokens=settings.batch_size * settings.sequence_length,
        memory=_memory(plan, compiled),
        flops=count_flops(settings, loss, plan.state.params),
        program=read_program(str(compiled.as_text()), devices),
    )


def bytes_of(tree: object) -> int:
    """Bytes of a tree's arrays on each device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape)
        total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize
    return total


def _memory(plan: Plan, compiled: jax.stages.Compiled) -> dict[str, float]:
    """Bytes of a device by kind; outputs lie where the donated arguments were."""
    facts = compiled.memory_analysis()
    if facts is None:
        raise TrainingError(
            "this compiler does not say how much memory a program needs"
        )
    params, optimizer = bytes_of(plan.state.params), bytes_of(plan.state.optimizer)
    arguments = facts.argument_size_in_bytes
    memory: dict[str, float] = {
        "parameters": params,
        "optimizer state": optimizer,
        "other arguments": arguments - params - optimizer,
        "outputs not in place": facts.output_size_in_bytes - facts.alias_size_in_bytes,
        "activations, gradients, temporaries": facts.temp_size_in_bytes,
        "program": facts.generated_code_size_in_bytes,
    }
    return memory | {"total": sum(memory.values())}


def count_flops(
    settings: Settings, loss: ava_jax.UnifiedLossConfig, params: optax.Params
) -> Flops:
    """Flops that a step asks for: 6 per token and weight of a matrix, and attention's.

    A causal token sees half of its row on average. The products with `lm_head` and
    with the heads that stand in its place are the loss's.
    """
    model, tokens = settings.model, settings.batch_size * settings.sequence_length
    weights = heads = 0.0
    for path, leaf in jax.tree.leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("lm_head"):
            shared = loss.use_mtp and loss.mtp_type == "sequential"
            times = 1 + loss.num_future_tokens * (shared and not is_adaptive(loss))
            heads += times * leaf.size
        elif name.endswith("heads/kernel"):
            heads += leaf.size
        elif any(f"experts/{part}" in name for part in ("gate", "up", "down")):
            weights += leaf.size * model.experts_per_token / model.experts
        elif name.endswith("kernel"):
            weights += leaf.size
    attention = 6 * model.layers * model.width * settings.sequence_length
    return Flops(tokens * (6 * weights + attention), tokens * 6 * heads)


def show(report: Report, console: Console) -> None:
    """Prints a report as tables."""
    memory = Table("memory of a device", "GiB", title_justify="left")
    for name, size in report.memory.items():
        memory.add_row(name, f"{size / GIB:.2f}")
    verdict = "fits" if report.fits else "does not fit"
    memory.add_row(f"HBM: {verdict}", f"{report.chip.memory / GIB:.2f}")
    flops = Table("Tflop of a step", "all devices", "each")
    for name, count in zip(Flops._fields, report.flops, strict=True):
        each = count / report.devices
        flops.add_row(name, f"{count / 1e12:,.3g}", f"{each / 1e12:,.3g}")
    sent = Table("collectives of a step", "count", "MiB sent by a device")
    for kind, traffic in report.program.traffic.items():
        sent.add_row(kind, f"{traffic.count:,}", f"{traffic.sent / 2**20:,.1f}")
    times = Table("estimated", "")
    for name, value in _times(report):
        times.add_row(name, value)
    for table in (memory, flops, sent, times):
        for column in table.columns[1:]:
            column.justify = "right"
        console.print(table)
    if report.program.kernels:
        console.print(
            f"Not estimated: {report.program.kernels:,} calls of kernels, which the "
            "compiler cannot look into. The step takes longer by their time.",
            highlight=False,
        )
    if report.program.unknown_loops:
        console.print(
            "Loops that run as often as the data say, counted once: "
            f"{report.program.unknown_loops}.",
            highlight=False,
        )


def _times(report: Report) -> Iterator[tuple[str, str]]:
    if not report.computation:
        yield "the compiler gives no estimate of its cycles", ""
        return
    yield (
        "computation, from the compiler's cycles",
        f"{report.computation * 1e3:,.1f} ms",
    )
    part = report.program.scoped_cycles / report.chip.clock
    yield "of it the loss", f"{part * 1e3:,.1f} ms"
    speed = f"{report.chip.bandwidth / 1e9:.0f} GB/s"
    yield f"communication, at {speed}", f"{report.communication * 1e3:,.1f} ms"
    yield "step, if they do not overlap", f"{report.seconds * 1e3:,.1f} ms"
    yield "tokens per second", f"{report.tokens / report.seconds:,.0f}"
    yield "model-flops utilisation", f"{report.utilisation:.1%}"

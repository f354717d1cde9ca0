"""--compile-for: what is refused, what is read out of a program, what is printed."""

import importlib.util
import subprocess
import sys
import types
from pathlib import Path
from typing import cast

import jax
import pytest
from rich.console import Console
from run_helpers import with_flags

import ava_jax
from train_tpu import main, make_train_step
from trainer.errors import TrainingError
from trainer.run.compile_for import (
    CHIPS,
    Plan,
    bytes_of,
    compile_plan,
    count_flops,
    find_devices,
    make_plan,
    make_report,
    show,
)
from trainer.run.devices import make_mesh
from trainer.run.program import Program, Traffic, read_program
from trainer.run.settings import Settings, make_loss_config, parse_settings

EXAMPLES = Path(__file__).parents[2] / "examples"

# A loop of three: a gather and a sum with a slice, which TPUs write as a fusion.
LOOP = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: bf16[8,4]) -> bf16[2,4] {
  %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[2,4]{1,0} dynamic-slice(%all-reduce.1)
}

%body (carry: (s32[], bf16[2,4])) -> (s32[], bf16[2,4]) {
  %all-gather.1 = bf16[8,4]{1,0} all-gather(%part), replica_groups=[2,4]<=[8], dimensions={0}
  %dot = f32[8,4]{1,0} fusion(%all-gather.1), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"100"}
  %scattered = bf16[2,4]{1,0} fusion(%dot), kind=kCustom, calls=%all-reduce-scatter.1
  %kernel = f32[8] custom-call(%dot), custom_call_target="tpu_custom_call"
}

%condition (carry: (s32[], bf16[2,4])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%number, %bound), direction=LT
}

ENTRY %main (x: bf16[2,4]) -> f32[] {
  %loop = (s32[]{:T(128)}, bf16[2,4]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %all-reduce.2 = (f32[]{:T(128)}, f32[4]{0}) all-reduce(%a, %b), replica_groups=mesh['data'=4,'tensor'=2] {'data','tensor'}, to_apply=%add
  %gathering = (f32[2]{0}, f32[4]{0}) all-gather-start(%c), replica_groups=mesh['data'=4,'tensor'=2] {'tensor'}, dimensions={0}
  %all-to-all.1 = f32[8]{0} all-to-all(%d), replica_groups=mesh['data'=4,'tensor'=2] {'data':(1)2}
  ROOT %out = f32[] fusion(%all-reduce.2), kind=kLoop, calls=%add, metadata={op_name="jit(step)/transpose(jvp(loss))/add"}, backend_config={"estimated_cycles":"7"}
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_run() -> None:
    program = read_program(LOOP, 8)
    assert program.cycles == 3 * 100 + 7
    assert program.scoped_cycles == 7
    assert program.kernels == 3
    assert program.unknown_loops == 0
    assert program.traffic == {
        "all-gather": Traffic(4, 3 * 64 * 3 / 4 + 16 / 2),
        "all-reduce": Traffic(1, 20 * 2 * 7 / 8),
        "reduce-scatter": Traffic(3, 3 * 64 * 3 / 4),
        "all-to-all": Traffic(1, 32 / 2),
    }
    assert program.sent == 144 + 8 + 35 + 144 + 16


@pytest.mark.parametrize(
    ("known", "condition", "start", "cycles", "unknown"),
    [
        (', known_trip_count={"n":"5"}', "", "", 507, 0),
        ("", "", "", 107, 1),
        (
            "",
            "%bound = s32[] get-tuple-element(%carry), index=1",
            "%nine = s32[] constant(9)\n  %start = (s32[], s32[]) tuple(%zero, %nine)",
            907,
            0,
        ),
    ],
)
def test_how_often_a_loop_runs(
    known: str, condition: str, start: str, cycles: int, unknown: int
) -> None:
    text = LOOP.replace("%bound = s32[]{:T(128)} constant(3)", condition)
    text = text.replace("body=%body", f"body=%body{known}")
    program = read_program(text.replace("  %loop", f"  {start}\n  %loop"), 8)
    assert (program.cycles, program.unknown_loops) == (cycles, unknown)


def settings_of(*flags: str) -> tuple[Settings, ava_jax.UnifiedLossConfig]:
    settings, fields = parse_settings(flags)
    size = settings.vocab_size
    return settings, make_loss_config(settings, fields, size, size - 1)


def plan(settings: Settings, loss: ava_jax.UnifiedLossConfig) -> Plan:
    """The step on one device."""
    mesh = make_mesh("data=1", 4, jax.devices()[:1])
    return make_plan(settings, loss, make_train_step, mesh)


SMALL = [
    "--model.layers=2",
    "--model.width=32",
    "--model.heads=4",
    "--model.kv-heads=2",
    "--model.remat",
    "--model.scan",
    "--model.attention-block=8",
    "--vocab-size=256",
    "--batch-size=8",
    "--sequence-length=16",
    "--microbatches=2",
    "--loss.no-use-mtp",
]


def test_the_table_of_a_step_on_devices_that_are_there() -> None:
    settings, loss = settings_of(*SMALL)
    mesh = make_mesh("data=2,fsdp=2,tensor=2", 4, jax.devices()[:8])
    made = make_plan(settings, loss, make_train_step, mesh)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(made.state.params))
    # All but the scales of the norms are split by fsdp and tensor.
    assert whole / 4 < bytes_of(made.state.params) < 1.05 * whole / 4
    compiled = compile_plan(made, CHIPS["v5e"])
    report = make_report(settings, loss, made, compiled, CHIPS["v5e"], 8)
    assert report.fits
    assert report.tokens == 128
    assert report.memory["optimizer state"] >= 2 * report.memory["parameters"]
    assert report.memory["total"] == sum(list(report.memory.values())[:-1])
    assert report.program.traffic["all-gather"].sent > 0
    console = Console(record=True, width=100, quiet=False, file=None)
    with console.capture() as capture:
        show(report, console)
    text = capture.get()
    for words in ("parameters", "HBM: fits", "all-reduce", "gives no estimate"):
        assert words in text


def test_estimates_come_from_cycles_and_bytes() -> None:
    settings, loss = settings_of(*SMALL)
    made = make_plan(
        settings, loss, make_train_step, make_mesh("data=1", 4, jax.devices()[:1])
    )
    compiled = compile_plan(made, CHIPS["v5p"])
    report = make_report(settings, loss, made, compiled, CHIPS["v5p"], 1)
    program = Program(1_750_000, 350_000, {"all-reduce": Traffic(2, 9e7)}, 5, 1)
    report = report._replace(program=program)
    assert report.seconds == pytest.approx(1.5e-3)
    peak = 1.5e-3 * 4.59e14
    assert report.utilisation == pytest.approx(sum(report.flops) / peak)
    console = Console(width=100)
    with console.capture() as capture:
        show(report, console)
    text = capture.get()
    for words in (
        "1.0 ms",
        "0.2 ms",
        "0.5 ms",
        "1.5 ms",
        "85,333",
        "5 calls",
        "counted once: 1",
    ):
        assert words in text
    report = report._replace(chip=CHIPS["v5p"].__class__(1.0, 1.0, 1.0, 1.0))
    assert not report.fits


def test_flops_are_those_of_the_matrices() -> None:
    settings, loss = settings_of(*SMALL)
    params = make_plan(
        settings, loss, make_train_step, make_mesh("data=1", 4)
    ).state.params
    flops = count_flops(settings, loss, params)
    inner = settings.model.inner
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * inner
    assert flops.model == 128 * (6 * 2 * layer + 6 * 2 * 32 * 16)
    assert flops.loss == 128 * 6 * 32 * 256


@pytest.mark.parametrize(
    ("flags", "heads"),
    [
        (["--loss.use-mtp"], 1 + 2),
        (["--loss.use-mtp", "--loss.mtp-type", "sequential"], 1 + 2),
        (["--loss.no-use-mtp"], 1),
    ],
)
def test_further_heads_are_flops_of_the_loss(flags: list[str], heads: int) -> None:
    settings, loss = settings_of(*SMALL, *flags)
    params = make_plan(
        settings, loss, make_train_step, make_mesh("data=1", 4)
    ).state.params
    flops = count_flops(settings, loss, params)
    assert flops.loss == heads * 128 * 6 * 32 * 256


def test_a_token_visits_some_of_the_experts() -> None:
    flags = ("--preset", "moe", *SMALL)
    settings, loss = settings_of(*flags, "--model.experts-per-token", "2")
    params = make_plan(
        settings, loss, make_train_step, make_mesh("data=1", 4)
    ).state.params
    two = count_flops(settings, loss, params).model
    settings, loss = settings_of(*flags, "--model.experts-per-token", "4")
    four = count_flops(settings, loss, params).model
    assert four - two == 128 * 6 * 2 * 3 * 32 * settings.model.inner


@pytest.mark.parametrize("topology", ["v5e", "v5e:2", "v9:2x2", "v5p:2x2x", "2x2"])
def test_a_topology_that_does_not_parse_says_what_does(topology: str) -> None:
    with pytest.raises(ValueError, match=r"such as v5e:2x2 or v5p:4x4x4, of v5e, v5p"):
        find_devices(topology)


def test_a_missing_compiler_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--compile-for", "v5e:2x2"]) == 1
    assert "pip install 'jax[tpu]'" in capsys.readouterr().err


def test_a_mesh_must_use_the_whole_topology() -> None:
    with pytest.raises(ValueError, match=r"must use all 8 devices"):
        make_mesh("data=2,tensor=2", 8, jax.devices()[:8])
    with pytest.raises(ValueError, match=r"needs 16 devices, but there are 8"):
        make_mesh("data=16", 16, jax.devices()[:8])
    with pytest.raises(ValueError, match=r"6 rows, which data=2,fsdp=2 devices"):
        make_mesh("data=2,fsdp=2,tensor=2", 6, jax.devices()[:8])


def test_a_step_that_needs_too_much_says_what_to_change() -> None:
    settings, loss = settings_of(*SMALL)
    made = plan(settings, loss)

    def refuse() -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Used 120G of 15.75G hbm.\nmany lines"
        )

    lowered = types.SimpleNamespace(compile=refuse)
    traced = types.SimpleNamespace(lower=lambda **options: lowered)
    step = types.SimpleNamespace(trace=lambda *arguments: traced)
    full = made._replace(step=cast(jax.stages.Wrapped, step))
    assert isinstance(full, Plan)
    with pytest.raises(TrainingError, match=r"fsdp or tensor.*120G of 15.75G hbm.$"):
        compile_plan(full, CHIPS["v5e"])


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler of TPUs, libtpu, is not installed: pip install 'jax[tpu]'",
)
@pytest.mark.parametrize(
    ("mesh", "code", "words"),
    [
        ("data=2,tensor=2", 0, ("HBM: fits", "15.75", "tokens per second", " ms")),
        ("data=2", 1, ("must use all 4 devices",)),
    ],
)
def test_the_demo_compiles_for_four_chips(
    tiny: list[str], mesh: str, code: int, words: tuple[str, ...]
) -> None:
    flags = with_flags(tiny, "--mesh", mesh)
    command = [sys.executable, str(EXAMPLES / "train_tpu.py"), "--preset", "demo"]
    done = subprocess.run(
        [*command, *flags, "--compile-for", "v5e:2x2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    for word in words:
        assert word in done.stdout + done.stderr

"""The benchmarks: timing, goals, and a run of every case."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    baselines,
    candidates,
    cases,
    goals,
    machine,
    records,
    run,
    scaling,
    shapes,
)
from benchmarks.arrays import baseline, make_batch
from benchmarks.candidates import candidate
from benchmarks.cases import EXACT, GROUPS, IMPLEMENTATIONS, LOGITS_ARRAY, Case, table
from benchmarks.timing import (
    Figures,
    Implementation,
    Skipped,
    time_interleaved,
    time_ratio,
)

TINY = shapes.tiny(shapes.DEPTHS)
ALL_CASES = table("cpu")
# Implementations whose value is not plain cross-entropy.
NO_LOSSES = {"three matmuls", "copy", "everything"}


def implementation(answer: Callable[[jax.Array], jax.Array]) -> Implementation:
    return Implementation(jax.jit(answer), (jnp.ones((2,)),))


def figures(*times: float, temp: int | None = 100, value: float = 2.0) -> Figures:
    return Figures(0.5, temp, 8, value, times)


def case_of(group: str, index: int = 0) -> Case:
    return [case for case in ALL_CASES if case.group == group][index]


def test_rounds_are_interleaved_and_rotate():
    seconds = {"a": 1.0, "b": 10.0, "c": 100.0}
    calls: list[str] = []
    now = [0.0]

    def record(name: str) -> Callable[[jax.Array], jax.Array]:
        def called(_: np.ndarray) -> None:
            calls.append(name)
            now[0] += seconds[name]

        def answer(x: jax.Array) -> jax.Array:
            jax.debug.callback(called, x, ordered=True)
            return x.sum()

        return answer

    def clock() -> float:
        jax.effects_barrier()
        return now[0]

    named = {name: implementation(record(name)) for name in seconds}
    results = time_interleaved(named, rounds=4, warmup=1, clock=clock)

    assert "".join(calls) == "abc" + "abc" + "bca" + "cab" + "abc"
    for name, result in results.items():
        assert isinstance(result, Figures)
        assert result.times == (seconds[name],) * 4
        assert result.value == 2.0


def test_time_ratio_is_taken_round_by_round():
    # A slow machine in rounds 2 and 3 slows both down equally: the ratio is always 2.
    ratio = time_ratio(figures(2.0, 20.0, 200.0), figures(1.0, 10.0, 100.0))
    assert ratio == (2.0, 2.0, 2.0)
    spread = time_ratio(figures(1.0, 2.0, 9.0, 4.0, 5.0), figures(*[1.0] * 5))
    assert spread == (4.0, 2.0, 5.0)


def test_summary_has_median_and_spread():
    summary = figures(1.0, 2.0, 9.0, 4.0, 5.0).summary()
    assert (summary["median"], summary["min"], summary["max"]) == (4.0, 1.0, 9.0)
    assert summary["interquartile_range"] == 3.0


def test_implementation_that_cannot_be_built_is_kept_with_its_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    batch = make_batch(shapes.tiny(shapes.FUSED))
    timed = time_interleaved(
        {
            "tokamax": baseline(baselines.tokamax_loss, batch),
            "sum": implementation(lambda x: x.sum()),
        },
        rounds=1,
    )
    tokamax, total = timed["tokamax"], timed["sum"]
    assert isinstance(tokamax, Skipped)
    assert "tokamax" in tokamax.reason
    assert isinstance(total, Figures)
    assert (total.output_bytes, len(total.times)) == (4, 1)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Unsupported implementation: chunked_xla", baselines.NEEDS_NEWER_TOKAMAX),
        ("bad shape\nand more", "tokamax: bad shape"),
    ],
)
def test_tokamax_that_refuses_is_skipped(monkeypatch, message, reason):
    class Refusing:
        @staticmethod
        def linear_softmax_cross_entropy_loss(*_: object, **__: object) -> jax.Array:
            raise ValueError(message)

    monkeypatch.setitem(sys.modules, "tokamax", Refusing)
    batch = make_batch(shapes.tiny(shapes.FUSED))
    timed = time_interleaved(
        {"tokamax": baseline(baselines.tokamax_loss, batch)}, rounds=1
    )
    assert timed == {"tokamax": Skipped(reason)}


def test_bug_in_an_implementation_is_not_a_skip():
    def wrong(x: jax.Array) -> jax.Array:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        time_interleaved({"wrong": implementation(wrong)}, rounds=1)


def test_goals_are_met_or_missed():
    case = case_of("fused")
    timed = {"plain": figures(7.0, temp=30), "naive": figures(10.0)}
    time, temp = goals.judge(case, {**timed})
    assert (time.status, time.goal) == ("met", 0.72)
    assert time.ratio == pytest.approx((0.7, 0.7, 0.7))
    assert (temp.status, temp.goal) == ("missed", 0.20)
    assert "plain / naive temp: 0.3, goal 0.2: missed" in temp.line()


def test_goals_of_a_skipped_baseline_give_its_reason():
    case = case_of("chunked")
    outcomes = goals.judge(
        dataclasses.replace(case, shape=shapes.tiny(case.shape)),
        {
            "plain": figures(1.0, value=9.0),
            "checkpointed": figures(2.0),
            "tokamax": Skipped("not here"),
        },
    )[:2]
    assert [outcome.status for outcome in outcomes] == ["met", "skipped"]
    assert outcomes[1].reason == "tokamax: not here"
    assert outcomes[1].line().endswith("skipped: tokamax: not here")


def test_memory_is_judged_against_one_logits_array():
    case = case_of("logits-everything")
    timed = {"everything": figures(1.0, temp=case.logits_bytes), "optax": figures(1.0)}
    _, temp = goals.judge(case, {**timed})
    assert case.logits_bytes == 1024 * 50304 * 4
    assert temp.ratio == (1.0, 1.0, 1.0)
    unknown = {"everything": figures(1.0, temp=None), "optax": figures(1.0)}
    assert goals.judge(case, {**unknown})[1].status == "skipped"


def test_bandwidth_is_a_fraction_of_the_copy():
    forward, gradient = (case_of("accelerator", index) for index in (3, 4))
    timed = {"plain": figures(1.0), "copy": figures(2.0)}
    assert goals.judge(forward, {**timed})[0].ratio == (1.0, 1.0, 1.0)
    outcome = goals.judge(gradient, {**timed})[0]
    assert (outcome.ratio, outcome.status) == ((3.0, 3.0, 3.0), "measured")


def names_of(cases):
    return {n for c in cases for g in c.goals for n in (g.candidate, g.baseline)}


def test_table_is_complete():
    titles = [(case.group, case.title) for case in ALL_CASES]
    assert len(set(titles)) == len(titles)
    known = {*IMPLEMENTATIONS, LOGITS_ARRAY, EXACT}
    xla = {"plain, by XLA"}
    assert names_of(ALL_CASES) == known - xla
    assert names_of(table("NVIDIA H100 80GB HBM3")) == known
    assert names_of(table("NVIDIA A100-SXM4-80GB")) == known - xla
    assert {case.group for case in table("cpu", quick=True)} == set(GROUPS)


def test_models_are_scaled_to_the_device():
    gemma = next(model for model in shapes.MODELS if model.name == "Gemma-2-9B")
    on_cpu = shapes.scaled(gemma, "cpu")
    assert (on_cpu.tokens, on_cpu.width, on_cpu.vocab) == (512, 448, 256000)
    on_gpu = shapes.scaled(gemma, "NVIDIA H100")
    assert (on_gpu.tokens, on_gpu.width, on_gpu.dtype) == (16384, 3584, "bfloat16")


def test_all_implementations_compute_the_same_loss():
    """The ratio to a baseline that computes another loss would be meaningless."""
    batch = make_batch(TINY)
    config = candidates.plain(TINY.vocab)
    ours = candidate(candidates.with_depths(config, TINY.depths), batch)
    theirs = baseline(baselines.naive_depths, batch)
    own, other = (each.function(*each.args) for each in (ours, theirs))
    assert own[0][0] == pytest.approx(float(other[0]), abs=1e-5)
    for name in batch.floats:
        np.testing.assert_allclose(own[1][name], other[1][name], atol=1e-6)

    floats = {k: v for k, v in batch.floats.items() if k != "mtp_hidden_states"}
    one = batch._replace(floats=floats)
    exact = baselines.exact_loss(one.targets, **floats)
    for each in (
        candidate(config, one, gradient=False),
        baseline(baselines.naive, one, gradient=False),
        baseline(baselines.checkpointed, one, gradient=False),
    ):
        loss = jax.tree.leaves(each.function(*each.args))[0]
        assert float(loss) == pytest.approx(exact, abs=1e-5)


def test_checkpointed_takes_several_chunks(monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK", 16)
    batch = make_batch(shapes.tiny(shapes.FUSED))
    loss = jax.jit(baselines.checkpointed)(batch.targets, **batch.floats)
    exact = baselines.exact_loss(batch.targets, **batch.floats)
    assert float(loss) == pytest.approx(exact, abs=1e-5)


def test_slope_is_the_exponent():
    sizes = [1, 2, 4, 8]
    assert scaling.slope(sizes, [3.0 * n**1.5 for n in sizes]) == pytest.approx(1.5)
    assert scaling.slope([4], [1.0]) is None
    assert scaling.slope([1, 2], [0.0, 1.0]) is None


def test_one_size_grows_along_an_axis():
    for axis in scaling.AXES:
        found = scaling.points(axis, "cpu")
        assert len(found) == 5
        first, *others = (dataclasses.asdict(shape) for shape in found.values())
        differing = {k for other in others for k in first if first[k] != other[k]}
        assert differing == {scaling.FIELDS.get(axis, "depths")}


def test_default_name_says_device_cores_and_version(monkeypatch):
    monkeypatch.setattr(machine, "_cores", lambda: 2)
    assert machine.default_name() == f"cpu2-jax{jax.__version__}"
    monkeypatch.setattr(machine, "device_kind", lambda: "NVIDIA H100 80GB")
    assert machine.default_name() == f"nvidia-h100-80gb-cpu2-jax{jax.__version__}"


def test_quick_results_have_a_name_of_their_own():
    assert run.parse(["--quick"]).name == "quick"
    assert run.parse([]).name == machine.default_name()
    assert run.parse(["--group", "fused", "--group", "depths"]).groups == (
        "fused",
        "depths",
    )
    with pytest.raises(SystemExit):
        run.parse(["--rounds", "0"])


def test_case_too_large_for_the_machine_is_skipped(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "free_memory", lambda: 2**10)
    run.main(["--quick", "--group", "fused", "--out", str(tmp_path)])
    results = records.load(tmp_path / "quick.json")
    assert results is not None
    goal = results["groups"]["fused"]["cases"][0]["goals"][0]
    assert (goal["status"], goal["ratio"]) == ("skipped", None)
    assert "0.0 are free" in goal["reason"]
    assert "skipped: needs" in capsys.readouterr().out


def test_inputs_that_do_not_fit_are_skipped(monkeypatch, tmp_path, capsys):
    def full(shape: shapes.Shape) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no memory\nand pages")

    monkeypatch.setattr(cases, "make_batch", full)
    run.main(["--quick", "--group", "fused", "--out", str(tmp_path)])
    assert "skipped: RESOURCE_EXHAUSTED: no memory\n" in capsys.readouterr().out


def test_cases_for_accelerators_run():
    """They are skipped on a CPU, where a mistake in them would not be seen."""
    found = table("TPU v5", quick=True)
    fused, *_, logits = (case for case in found if case.group == "accelerator")
    assert (bool(fused.shape.width), bool(logits.shape.width)) == (True, False)
    for case in (fused, logits):
        results = time_interleaved(case.build(), rounds=1)
        ran = {k: v for k, v in results.items() if isinstance(v, Figures)}
        # Tokamax is an extra, and not for every Python.
        assert set(results) - set(ran) <= {"tokamax", "tokamax xla"}
        assert len(goals.judge(case, results)) == len(case.goals)
        losses = {k: v.value for k, v in ran.items() if k not in NO_LOSSES}
        assert {"plain", "naive"} - set(losses) == (
            set() if case == fused else {"naive"}
        )
        for name, loss in losses.items():
            assert loss == pytest.approx(losses["plain"], rel=1e-2), name


def test_merging_keeps_other_groups(tmp_path):
    options = ["--quick", "--name", "here", "--out", str(tmp_path), "--group"]
    path = tmp_path / "here.json"
    run.main([*options, "logits-forward"])
    first = records.load(path)
    run.main([*options, "accelerator"])
    both = records.load(path)
    assert first is not None
    assert both is not None
    assert list(both["groups"]) == ["logits-forward", "accelerator"]
    assert both["groups"]["logits-forward"] == first["groups"]["logits-forward"]
    run.main([*options, "logits-forward"])
    again = records.load(path)
    assert again is not None
    times = [
        results["groups"]["logits-forward"]["cases"][0]["implementations"]
        for results in (first, again)
    ]
    assert times[0] != times[1]


@pytest.mark.slow
@pytest.mark.usefixtures("unannotated")
def test_every_group_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run.main(["--quick", "--scaling", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "quick.json").read_text())

    assert results["machine"]["device"] == "cpu"
    assert results["machine"]["cores"] >= 1
    assert results["versions"]["jax"] == jax.__version__
    assert {"python", "optax", "flax", "tokamax", "ava_jax"} <= set(results["versions"])
    assert results["rounds"] == 2
    assert list(results["groups"]) == list(GROUPS)
    assert list(results["scaling"]) == ["N", "D", "V", "K"]
    found = [case for each in results["groups"].values() for case in each["cases"]]
    for case in found:
        _check_case(case)
    for axis in results["scaling"].values():
        assert len(axis["points"]) == 2
        assert isinstance(axis["time_slope"], float)
    lines = [line for line in capsys.readouterr().out.splitlines() if " / " in line]
    assert len(lines) == sum(len(case["goals"]) for case in found)
    for plot in ("ratios", "scaling"):
        picture = (tmp_path / f"quick-{plot}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")


def _check_case(case: records.CaseRecord) -> None:
    for figures in case["implementations"].values():
        if "skipped" in figures:
            assert figures["skipped"]
            continue
        assert len(figures["times"]) == 2
        assert figures["min"] <= figures["median"] <= figures["max"]
        assert figures["compile_seconds"] > 0
    for goal in case["goals"]:
        assert (goal["status"] == "skipped") == (goal["ratio"] is None)
        assert bool(goal["reason"]) == (goal["ratio"] is None)
        if goal["metric"] == "error":
            assert goal["status"] == "met"

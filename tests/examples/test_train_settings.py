"""Flags, presets and loss files: who goes before whom, and what is refused."""

import json
from pathlib import Path

import pytest

import ava_jax
from trainer.errors import TrainingError
from trainer.run.settings import PRESETS, make_loss_config, parse_settings


def loss_of(arguments: list[str], vocab_size: int = 300) -> ava_jax.UnifiedLossConfig:
    settings, fields = parse_settings(arguments)
    return make_loss_config(settings, fields, vocab_size, vocab_size - 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_makes_a_loss_that_knows_the_model(preset: str) -> None:
    settings, fields = parse_settings(["--preset", preset])
    loss = make_loss_config(settings, fields, 300, 299)
    assert settings.preset == preset
    assert settings.out == Path("runs") / preset
    assert (loss.vocab_size, loss.eos_token_id) == (300, 299)
    assert loss.hidden_size == settings.model.width


def test_the_demo_is_the_whole_deepseek_style() -> None:
    loss = loss_of([])
    assert (loss.primary_loss_type, loss.mtp_type) == ("deepseek", "parallel")
    assert loss.use_mtp
    assert loss.use_ngram_penalty
    assert loss.use_immediate_repetition_penalty
    assert loss.eos_token_id is not None
    assert loss.penalty_source == "predictions"


def test_no_preset_has_what_makes_the_model_worse() -> None:
    for preset in ("demo", "moe", "small", "gpt2"):
        loss = loss_of(["--preset", preset])
        assert not loss.adaptive_temperature
        assert loss.label_smoothing == 0
    loss = loss_of(["--preset", "adaptive-mtp"])
    assert loss.label_smoothing == 0
    assert loss.stop_confidence_gradient


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_flags_go_before_the_file_and_the_file_before_the_preset(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"loss.{suffix}"
    fields = {"label_smoothing": 0.2, "mtp_weight": 0.3, "use_mtp": False}
    if suffix == "json":
        path.write_text(json.dumps(fields))
    else:
        path.write_text("\n".join(f"{k}: {str(v).lower()}" for k, v in fields.items()))
    flags = ["--loss-config", str(path), "--loss.mtp-weight", "0.4", "--loss.use-mtp"]
    loss = loss_of(flags)
    assert loss.label_smoothing == 0.2
    assert loss.mtp_weight == 0.4
    assert loss.use_mtp
    assert loss.ngram_size == ava_jax.UnifiedLossConfig(vocab_size=8).ngram_size


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "loss.yml"
    path.write_text("load_balancing_weight: 1e-4\n")
    assert loss_of(["--loss-config", str(path)]).load_balancing_weight == 1e-4


def test_sizes_in_the_file_size_the_model(tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    path.write_text('{"vocab_size": 50257, "hidden_size": 64, "eos_token_id": 50256}')
    settings, fields = parse_settings(["--loss-config", str(path)])
    assert (settings.vocab_size, settings.model.width) == (50257, 64)
    loss = make_loss_config(settings, fields, 50257, 50256)
    assert (loss.vocab_size, loss.hidden_size, loss.eos_token_id) == (50257, 64, 50256)
    with pytest.raises(ValueError, match=r"eos_token_id=50256.*is 299"):
        make_loss_config(settings, fields, 300, 299)


def test_no_eos_in_the_file_turns_the_early_eos_penalty_off(tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    path.write_text('{"eos_token_id": null}')
    assert loss_of(["--loss-config", str(path)]).eos_token_id is None


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "loss.json"
    path.write_text('{"label_smothing": 0.1}')
    with pytest.raises(ValueError, match=r"label_smothing.*'label_smoothing'"):
        loss_of(["--loss-config", str(path)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", "does not parse"),
        ("a.yaml", "a: [", "does not parse"),
        ("a.json", "[1]", "must hold a mapping"),
        ("a.json", '{"vocab_size": "many"}', "vocab_size.*must be an int"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(TrainingError, match=message):
        parse_settings(["--loss-config", str(path)])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot read.*nowhere"):
        parse_settings(["--loss-config", str(tmp_path / "nowhere.json")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--batch-size", "8", "--microbatches", "3"], "multiple of --microbatches"),
        (["--warmup-steps", "900"], "--warmup-steps must lie between"),
        (["--heldout", "1.5"], "--heldout must lie in"),
        (["--model.width", "30"], "model.width must be a multiple"),
        (["--loss.label-smoothing", "1.5"], "label_smoothing must be in"),
        (["--loss.use-moe-balancing"], "needs experts: pass --model.experts"),
        (["--loss.use-contrastive-loss"], "--loss.contrastive-type simctg"),
    ],
)
def test_values_out_of_range_say_what_to_do(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((ValueError, SystemExit)) as refusal:
        loss_of(flags)
    words = f"{refusal.value} {capsys.readouterr().err}".replace("│", "").split()
    assert message in " ".join(words)


@pytest.mark.parametrize("flags", [["--stepz", "3"], ["--preset", "huge"]])
def test_unknown_flags_exit_with_a_message(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_settings(flags)
    assert stop.value.code != 0
    captured = capsys.readouterr()
    assert flags[0] in captured.err + captured.out


def test_help_describes_the_fields_of_the_loss(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_settings(["--preset", "moe", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--loss.label-smoothing" in text
    assert "--loss.moe-balancing-type" in text
    assert "given to the other" in text

"""What a run is: presets, command-line flags, the loss's fields, the run's record."""

import argparse
import dataclasses
import functools
import json
import operator
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

import ava_jax
from trainer.errors import TrainingError
from trainer.model.layers import ModelConfig

Preset = Literal[
    "demo", "moe", "adaptive-mtp", "small", "gpt2", "llama3-1b", "llama3-8b"
]
LossFields = dict[str, object]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a language model under the unified loss.

    A run lives in its folder: called again with the same --out and more --steps, it
    resumes exactly where it stopped. Ctrl-C saves and exits with code 0.
    """

    preset: Preset = "demo"
    """Preset that the other defaults come from."""
    out: Path = Path("runs/demo")
    """Folder of the run."""
    data: Path | None = None
    """Text file, .jsonl with a "text" key, .gz of these, or a folder; by default the
    source of this Python's standard library."""
    loss_config: Path | None = None
    """JSON or YAML file with fields of the loss; --loss.* flags go before it."""
    steps: int = 800
    """Stop after this many optimizer steps, counted from the run's beginning."""
    batch_size: int = 8
    """Rows per optimizer step (B), over all devices and micro-batches."""
    sequence_length: int = 128
    """Tokens per row (S)."""
    microbatches: int = 1
    """Micro-batches per optimizer step; they do not change the result."""
    mesh: str = ""
    """Devices per axis, such as data=4,fsdp=2,tensor=2; by default all along data. The
    axes data and fsdp share the rows, fsdp and tensor the parameters."""
    compile_for: str = ""
    """Train nothing: compile the step for these TPUs, such as v5p:4x4x4, and print what
    it needs and how long it should take. No TPU has to be there."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the model; parameters and the loss's statistics stay float32."""
    seed: int = 0
    """Seed of the parameters and of the order of the rows."""
    fused: bool = True
    """Let the loss multiply by lm_head in chunks, so that no logits are stored."""
    vocab_size: int = 2048
    """Size of the tokenizer's vocabulary (V)."""
    learning_rate: float = 5e-3
    """Peak of the learning rate."""
    warmup_steps: int = 50
    """Steps in which the learning rate rises to its peak."""
    schedule_steps: int = 800
    """Step at which the learning rate has fallen, by a cosine, to a tenth of its peak,
    where it stays. It does not follow --steps, so that a run can be prolonged."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, on matrices only."""
    clip_norm: float = 1.0
    """Largest norm of a gradient."""
    max_skipped_steps: int = 5
    """Steps in a row that may be skipped because the loss, the gradient or the new
    parameters are not finite. A skipped step changes nothing but the position in the
    data; one more than this many stops the run."""
    deterministic: bool = False
    """On GPUs, use only operations that give the same bits every time (sets
    --xla_gpu_deterministic_ops=true): slower. CPUs and TPUs do so anyway."""
    heldout: float = 0.02
    """Fraction of the rows that is held out for evaluation."""
    eval_batches: int = 40
    """Evaluate on at most this many held-out batches."""
    log_every: int = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: int = 200
    """Steps between two checkpoints; one is also made at the end."""
    keep: int = 2
    """Checkpoints to keep."""
    prompt: str = "def "
    """What the sample begins with."""
    sample_tokens: int = 120
    """Length of the sample, at most the sequence length; 0 for none."""
    cache: Path = Path(__file__).resolve().parents[3] / ".cache"
    """Folder for tokenizers and tokenized text."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "microbatches",
            "schedule_steps",
            "eval_batches",
            "log_every",
            "checkpoint_every",
            "keep",
        ):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{_flag(name)} must be at least 1, got {getattr(self, name)}"
                )
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"--batch-size must be a multiple of --microbatches: got "
                f"{self.batch_size} and {self.microbatches}"
            )
        if not 0 <= self.warmup_steps < self.schedule_steps:
            raise ValueError(
                "--warmup-steps must lie between 0 and --schedule-steps - 1 = "
                f"{self.schedule_steps - 1}, got {self.warmup_steps}"
            )
        if self.max_skipped_steps < 0:
            raise ValueError(
                "--max-skipped-steps must be at least 0, which stops at the first, "
                f"got {self.max_skipped_steps}"
            )
        if not 0 < self.heldout < 1:
            raise ValueError(f"--heldout must lie in (0, 1), got {self.heldout}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Every term of the DeepSeek style, spelled out for the reader. Two are off: smoothing
# makes the model worse, and a temperature would be part of it: see docs/results.md.
DEEPSEEK_STYLE: LossFields = {
    "primary_loss_type": "deepseek",
    "adaptive_temperature": False,
    "label_smoothing": 0.0,
    "use_mtp": True,
    "mtp_type": "parallel",
    "num_future_tokens": 2,
    "mtp_weight": 0.1,
    "penalty_source": "predictions",
    "use_ngram_penalty": True,
    "use_immediate_repetition_penalty": True,
    "eos_penalty_weight": 0.05,
}


def _llama(
    preset: Preset, rows: int, *, layers: int, width: int, inner: int
) -> tuple[Settings, LossFields]:
    """Returns a model of the size of a Llama 3, but with an untied `lm_head`."""
    settings = Settings(
        preset=preset,
        out=Path("runs") / preset,
        steps=100_000,
        schedule_steps=100_000,
        warmup_steps=2000,
        batch_size=rows,
        sequence_length=4096,
        vocab_size=128_256,
        learning_rate=3e-4,
        dtype="bfloat16",
        log_every=10,
        checkpoint_every=1000,
        model=ModelConfig(
            layers=layers,
            width=width,
            heads=32,
            kv_heads=8,
            inner_width=inner,
            attention_block=1024,
            remat=True,
            scan=True,
        ),
    )
    return settings, DEEPSEEK_STYLE | {"use_mtp": False}


PRESETS: dict[Preset, tuple[Settings, LossFields]] = {
    "demo": (Settings(), DEEPSEEK_STYLE),
    "moe": (
        Settings(
            preset="moe",
            out=Path("runs/moe"),
            steps=400,
            schedule_steps=400,
            model=ModelConfig(experts=8, dense_layers=1),
        ),
        DEEPSEEK_STYLE
        | {
            "use_moe_balancing": True,
            "moe_balancing_type": "bias",
            "use_auxiliary_loss": True,
        },
    ),
    "adaptive-mtp": (
        Settings(
            preset="adaptive-mtp",
            out=Path("runs/adaptive-mtp"),
            steps=400,
            schedule_steps=400,
        ),
        {
            "primary_loss_type": "adaptive_mtp",
            "label_smoothing": 0.0,
            "num_future_tokens": 2,
            "use_confidence_weighting": True,
            # With the gradient, the gate closes to escape the heads' loss.
            "stop_confidence_gradient": True,
        },
    ),
    "small": (
        Settings(
            preset="small",
            out=Path("runs/small"),
            steps=5000,
            schedule_steps=5000,
            warmup_steps=200,
            batch_size=32,
            sequence_length=512,
            vocab_size=8192,
            learning_rate=1.5e-3,
            dtype="bfloat16",
            checkpoint_every=1000,
            model=ModelConfig(layers=8, width=512, heads=8),
        ),
        DEEPSEEK_STYLE | {"mtp_type": "sequential", "num_future_tokens": 1},
    ),
    "gpt2": (
        Settings(
            preset="gpt2",
            out=Path("runs/gpt2"),
            steps=20_000,
            schedule_steps=20_000,
            warmup_steps=700,
            batch_size=64,
            microbatches=4,
            sequence_length=1024,
            vocab_size=50_257,
            learning_rate=6e-4,
            dtype="bfloat16",
            log_every=10,
            checkpoint_every=1000,
            model=ModelConfig(layers=12, width=768, heads=12),
        ),
        DEEPSEEK_STYLE | {"mtp_type": "sequential", "num_future_tokens": 1},
    ),
    "llama3-1b": _llama("llama3-1b", 64, layers=16, width=2048, inner=8192),
    "llama3-8b": _llama("llama3-8b", 512, layers=32, width=4096, inner=14_336),
}

# The trainer knows these itself, from the tokenizer and the model.
DERIVED = (
    "vocab_size",
    "hidden_size",
    "eos_token_id",
    "pad_token_id",
    "ignore_index",
    "num_experts",
    "num_moe_layers",
)


def parse_settings(arguments: Sequence[str]) -> tuple[Settings, LossFields]:
    """Reads the command line: flags go before the loss file, that before the preset.

    Raises:
      TrainingError: the loss file is missing or is not a mapping.
      ValueError: a flag or a field out of its range.
    """
    peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    peek.add_argument("--preset", choices=tuple(PRESETS), default="demo")
    peek.add_argument("--loss-config", "--loss_config", type=Path)
    known, _ = peek.parse_known_args(arguments)
    settings, fields = PRESETS[known.preset]
    fields = fields | _read_fields(known.loss_config)
    settings = _sized_by(settings, fields)
    flags = _loss_flags(fields)
    command = dataclasses.make_dataclass(
        "Command",
        [
            ("settings", Annotated[Settings, tyro.conf.arg(name="")], settings),
            ("loss", flags, flags()),
        ],
        frozen=True,
    )
    parsed = tyro.cli(
        command, args=arguments, prog="train_tpu.py", description=Settings.__doc__
    )
    return parsed.settings, fields | dataclasses.asdict(parsed.loss)


def _read_fields(path: Path | None) -> LossFields:
    if path is None:
        return {}
    try:
        text = path.read_text("utf-8-sig")
        is_yaml = path.suffix in (".yaml", ".yml")
        fields = yaml.safe_load(text) if is_yaml else json.loads(text)
    except OSError as error:
        raise TrainingError(f"cannot read --loss-config {path}: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TrainingError(f"--loss-config {path} does not parse: {error}") from error
    if not isinstance(fields, dict):
        raise TrainingError(
            f"--loss-config {path} must hold a mapping of the loss's fields, got "
            f"{type(fields).__name__}"
        )
    return {str(name): _number(value) for name, value in fields.items()}


def _number(value: object) -> object:
    """YAML reads 1e-4 as text, because it has no point."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _sized_by(settings: Settings, fields: LossFields) -> Settings:
    """Makes sizes in the loss file the defaults of the model's."""
    sizes = {
        name: value
        for name, value in fields.items()
        if name in ("vocab_size", "hidden_size", "num_experts") and value is not None
    }
    for name, value in sizes.items():
        if not isinstance(value, int):
            raise TrainingError(
                f"{name} in --loss-config must be an int, got {value!r}"
            )
    model: dict[str, object] = {}
    if "hidden_size" in sizes:
        model["width"] = sizes["hidden_size"]
    if "num_experts" in sizes:
        model["experts"] = sizes["num_experts"]
    changes: dict[str, object] = {}
    if model:
        changes["model"] = dataclasses.replace(settings.model, **model)
    if "vocab_size" in sizes:
        changes["vocab_size"] = sizes["vocab_size"]
    return dataclasses.replace(settings, **changes)


def _loss_flags(fields: Mapping[str, object]) -> type:
    """A dataclass with the loss's fields as flags, `fields` as their defaults."""
    hints = typing.get_type_hints(ava_jax.UnifiedLossConfig)
    entries = [
        (
            field.name,
            _plain(hints[field.name]),
            dataclasses.field(default=fields.get(field.name, field.default)),
        )
        for field in dataclasses.fields(ava_jax.UnifiedLossConfig)
        if field.name not in DERIVED
    ]
    flags = dataclasses.make_dataclass("LossFlags", entries, frozen=True)
    flags.__doc__ = ava_jax.UnifiedLossConfig.__doc__
    return flags


def _plain(hint: object) -> object:
    """Returns the part of a field's type that a command line can express."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    kept = [
        part
        for part in typing.get_args(hint)
        if part in (bool, int, float, str, type(None))
        or typing.get_origin(part) is tuple
    ]
    return functools.reduce(operator.or_, kept)


def make_loss_config(
    settings: Settings, fields: LossFields, vocab_size: int, eos: int
) -> ava_jax.UnifiedLossConfig:
    """Joins the loss's fields with what the tokenizer and the model decide.

    Raises:
      ValueError: a field is unknown or out of range, or names an EOS that is not the
        tokenizer's, or a term needs what this trainer cannot give.
    """
    model = settings.model
    if fields.get("eos_token_id", eos) not in (eos, None):
        raise ValueError(
            f"eos_token_id={fields['eos_token_id']} in --loss-config is not the "
            f"tokenizer's, which is {eos}, the last id of {vocab_size}: leave it out, "
            "or make vocab_size fit"
        )
    if not model.experts:
        for term in ("use_moe_balancing", "use_auxiliary_loss", "use_diversity_loss"):
            if fields.get(term):
                raise ValueError(f"loss.{term} needs experts: pass --model.experts 8")
    _check_quantiles(fields)
    contrastive = fields.get("contrastive_type", "infonce")
    if fields.get("use_contrastive_loss") and contrastive != "simctg":
        raise ValueError(
            f"loss.contrastive_type={contrastive!r} compares rows that belong "
            "together, which plain text does not have: pass "
            "--loss.contrastive-type simctg"
        )
    derived = {
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "eos_token_id": fields.get("eos_token_id", eos),
        "num_experts": model.experts or None,
        "num_moe_layers": model.expert_layers or None,
    }
    return ava_jax.create_unified_loss(fields | derived).config


def _check_quantiles(fields: LossFields) -> None:
    """Refuses terms of the routers' logits where the loss gets their scores."""
    quantiles = fields.get("moe_balancing_type") == "quantile"
    if (
        quantiles
        and fields.get("use_moe_balancing")
        and fields.get("use_auxiliary_loss")
    ):
        raise ValueError(
            "loss.use_auxiliary_loss takes the logits of the routers, and "
            "loss.moe_balancing_type='quantile' their scores, as the same argument: "
            "pass --loss.no-use-auxiliary-loss"
        )

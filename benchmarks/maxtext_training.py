"""MaxText's programs with its own losses or with ours, and what they train to.

A tiny model trains on MaxText's synthetic rows in MaxText's own train loop, on eight
fake devices, once with each loss. The metrics are those that MaxText writes.
"""

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict
from unittest import mock

PRE_TRAIN = "maxtext.trainers.pre_train"
STEPS = 20
DEVICES = 8
# Any number above 1 makes MaxText call our loss.
TILES = 8

Settings = Mapping[str, str | int | float]
Options = Mapping[str, Any]

PLAIN: Options = {
    "primary_loss_type": "standard",
    "label_smoothing": 0.0,
    "use_ngram_penalty": False,
    "use_immediate_repetition_penalty": False,
}
# The defaults and early EOS; the z-loss is a setting of MaxText.
EVERYTHING: Options = {"eos_token_id": 2}

TINY: Settings = {
    "base_num_decoder_layers": 2,
    "base_emb_dim": 64,
    "base_mlp_dim": 128,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_target_length": 32,
    "per_device_batch_size": 1,
    "ici_fsdp_parallelism": 4,
    "ici_tensor_parallelism": 2,
    "dtype": "float32",
    "attention": "dot_product",
    "hardware": "cpu",
    "skip_jax_distributed_system": "true",
    "learning_rate": 0.003,
    "steps": STEPS,
    "packing": "false",
    "enable_tensorboard": "false",
    "enable_goodput_recording": "false",
    "monitor_goodput": "false",
    "log_config": "false",
}
Z_LOSS: Settings = {"z_loss_multiplier": 1e-3}
PACKED: Settings = {"packing": "true", "max_segments_per_seq": 4}
HEADS: Mapping[str, Settings] = {
    "untied": {"logits_via_embedding": "false"},
    "tied": {"logits_via_embedding": "true"},
}
# What is compared, by the settings that differ from `TINY`.
CASES: Mapping[str, Settings] = {
    f"{head}{name}": {**settings, **more}
    for head, settings in HEADS.items()
    for name, more in {
        "": {},
        ", z-loss": Z_LOSS,
        ", z-loss, packed": {**Z_LOSS, **PACKED},
    }.items()
}
METRICS = ("loss", "perplexity", "z_loss", "grad_norm", "param_norm")

Metrics = Mapping[str, float]


class Training(TypedDict):
    """A model trained with MaxText's loss and with ours.

    Attributes:
      losses: MaxText's loss of the first and of the last step.
      gaps: the largest relative difference of each of `METRICS` over the steps.
      tiling_gaps: the same of MaxText's vocabulary tiling.
      settings: MaxText's settings that differ from `TINY`.
    """

    losses: tuple[float, float]
    gaps: dict[str, float]
    tiling_gaps: dict[str, float]
    settings: dict[str, str | int | float]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Leaves MaxText as it was, whatever loss is put into it."""
    train = importlib.import_module(f"{PRE_TRAIN}.train")
    model = importlib.import_module("maxtext.models.models").Transformer
    with (
        mock.patch.object(train, "vocab_tiling_nnx_loss", train.vocab_tiling_nnx_loss),
        mock.patch.object(model, "__init__", model.__init__),
    ):
        yield


@contextlib.contextmanager
def installed(options: Options | None) -> Iterator[None]:
    """Puts our loss into MaxText for a while; None leaves MaxText as it is."""
    with restored():
        if options is not None:
            importlib.import_module("maxtext_loss").use(**options)
        yield


def use_one_order() -> None:
    """Has all fake devices run a program's collectives in the same order.

    Otherwise those that do not depend on each other may run in different orders, and
    then wait for each other for ever. XLA reads its flags when the first is used.
    """
    flag = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"


def run(program: str, settings: Settings, options: Options | None) -> None:
    """Runs one of MaxText's programs.

    Args:
      program: the module of `PRE_TRAIN` whose `main` is called.
      settings: MaxText's settings; the others keep their defaults.
      options: our loss's options; None runs MaxText's own loss.
    """
    maxtext = importlib.import_module("maxtext")
    base = Path(maxtext.__path__[0]) / "configs" / "base.yml"
    with tempfile.TemporaryDirectory() as out, installed(options):
        given = {
            "run_name": "benchmark",
            "base_output_directory": out,
            "dataset_type": "synthetic",
            "enable_checkpointing": "false",
            "jax_cache_dir": "",
            **settings,
        }
        arguments = [f"{name}={value}" for name, value in given.items()]
        main = importlib.import_module(f"{PRE_TRAIN}.{program}").main
        main(["", str(base), *arguments])


def train(settings: Settings, options: Options | None) -> list[Metrics]:
    """Trains in MaxText's loop and returns the metrics of every step.

    Args:
      settings: MaxText's settings that differ from `TINY`.
      options: our loss's options; None trains with MaxText's own loss.
    """
    tiles = 1 if options is None else TILES
    with tempfile.TemporaryDirectory() as out:
        file = Path(out) / "metrics.json"
        own = {"num_vocab_tiling": tiles, "metrics_file": str(file)}
        run("train", {**TINY, **own, **settings}, options)
        return [json.loads(line) for line in file.read_text().splitlines()]


def largest_gaps(
    ours: Sequence[Metrics], theirs: Sequence[Metrics]
) -> dict[str, float]:
    """Returns the largest relative difference of each metric over the steps.

    Args:
      ours: the metrics of every step.
      theirs: of the same steps; where a metric is 0, the difference is absolute.
    """

    def gap(name: str) -> float:
        pairs = zip(
            (step[f"learning/{name}"] for step in ours),
            (step[f"learning/{name}"] for step in theirs),
            strict=True,
        )
        return max(abs(a - b) / (abs(b) or 1.0) for a, b in pairs)

    return {name: gap(name) for name in METRICS}


def compare(settings: Settings) -> Training:
    """Trains with MaxText's loss, with its vocabulary tiling, and with ours, plain.

    Args:
      settings: MaxText's settings that differ from `TINY`.
    """
    own = train(settings, None)
    tiling = train({"num_vocab_tiling": TILES, **settings}, None)
    first, last = (own[step]["learning/loss"] for step in (0, -1))
    return Training(
        losses=(first, last),
        gaps=largest_gaps(train(settings, PLAIN), own),
        tiling_gaps=largest_gaps(tiling, own),
        settings=dict(settings),
    )

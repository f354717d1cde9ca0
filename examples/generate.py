"""Continues a prompt with a trained model and prints the text as it is generated.

    python examples/generate.py runs/demo --prompt "def "
    python examples/generate.py runs/demo --prompt "def " --greedy --speculative

It reads the newest checkpoint and does not disturb a running trainer. The text goes to
stdout, everything else to stderr. Exit code 1: an error, explained on stderr. 130:
Ctrl-C.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tokenizers import Tokenizer

import ava_jax
from trainer.data.text import end_of_text, load_tokenizer
from trainer.decode.decoder import GREEDY, Cursor, Decoder, Sampling
from trainer.decode.speculate import Flight, Speculator
from trainer.errors import TrainingError
from trainer.model.language_model import LanguageModel
from trainer.model.layers import ModelConfig
from trainer.report.run_files import read_run
from trainer.run.checkpoint import Checkpoints
from trainer.run.evaluate import routing_bias
from trainer.run.settings import Settings
from trainer.run.state import init_state, make_model

# What the tokenizer shows for bytes that are not yet a whole character.
UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Trained(NamedTuple):
    """The model of a run, with its tokenizer.

    Attributes:
      model: the model.
      params: its parameters.
      bias: of the routers.
      tokenizer: of the run.
      step: of the checkpoint.
      length: tokens of the rows that it was trained on.
    """

    model: LanguageModel
    params: optax.Params
    bias: Float[Array, "L E"] | None
    tokenizer: Tokenizer
    step: int
    length: int

    def encode(self, prompt: str) -> list[int]:
        """Returns the prompt's tokens, behind the end of text that documents follow."""
        return [end_of_text(self.tokenizer), *self.tokenizer.encode(prompt).ids]


def load(folder: Path, step: int | None = None) -> Trained:
    """Loads a run's checkpoint, by default the newest.

    Raises:
      TrainingError: there is no run or no such checkpoint, or it is corrupt.
    """
    config = read_run(folder).config
    settings, loss = _rebuild(folder, config["settings"], config["loss"])
    model = make_model(settings, loss)
    checkpoints = Checkpoints(folder / "checkpoints", settings.keep)
    steps = checkpoints.steps()
    if not steps:
        raise TrainingError(f"{folder} has no checkpoint yet: train it longer")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise TrainingError(
            f"{folder} has no checkpoint of step {step}, but of {known}"
        )
    chosen = steps[-1] if step is None else step
    make = functools.partial(
        init_state, settings, model, ava_jax.unified_loss(model.loss)
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: x.update(sharding=here), jax.eval_shape(make))
    state, _ = checkpoints.restore(chosen, shapes)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    bias = routing_bias(state.loss)
    length = settings.sequence_length
    return Trained(model, state.params, bias, tokenizer, chosen, length)


def _rebuild(
    folder: Path, settings: object, loss: object
) -> tuple[Settings, ava_jax.UnifiedLossConfig]:
    """Makes settings and loss of what `config.json` says."""
    try:
        fields = dict(settings) if isinstance(settings, dict) else {}
        fields["model"] = ModelConfig(**fields["model"])
        names = {field.name for field in dataclasses.fields(Settings)}
        kept = {k: v for k, v in fields.items() if k in names}
        config = ava_jax.UnifiedLossConfig(**loss) if isinstance(loss, dict) else None
        if config is not None:
            return Settings(**kept), config
    except (KeyError, TypeError, ValueError) as error:
        raise TrainingError(
            f"{folder / 'config.json'} is of another version of the trainer: {error}"
        ) from error
    raise TrainingError(f"{folder / 'config.json'} has no loss")


def stream_tokens(
    trained: Trained, prompt: Sequence[int], count: int, sampling: Sampling, seed: int
) -> Iterator[list[int]]:
    """Yields `count` tokens, one by one; the first comes when all is compiled."""
    decoder = Decoder.of(trained.model, len(prompt) + count)

    def advance(
        params: optax.Params,
        bias: Array | None,
        keys: Array,
        cursor: Cursor,
        number: Int[Array, ""],
    ) -> tuple[Cursor, Int[Array, "1"]]:
        token = decoder.pick(params, cursor, keys[number], sampling)
        return decoder.extend(params, bias, cursor, token), token

    learned = (trained.params, trained.bias)
    # To take one out here would take longer than the step does.
    keys = jax.random.split(jax.random.key(seed), count)
    step = functools.partial(jax.jit(advance), *learned, keys)
    cursor = jax.jit(decoder.begin)(*learned, *_one_row(prompt))
    jax.block_until_ready(step(cursor, np.int32(0)))
    yield []
    for number in range(count):
        cursor, token = step(cursor, np.int32(number))
        yield [token.item()]


def stream_drafts(
    trained: Trained, prompt: Sequence[int], count: int
) -> Iterator[list[int]]:
    """Yields `count` tokens, as many at a time as a call of the model makes."""
    speculator = Speculator.of(trained.model, len(prompt) + count)
    learned = (trained.params, trained.bias)
    step = functools.partial(jax.jit(speculator.call), *learned)
    begin = jax.jit(speculator.begin, static_argnames="count")
    flight: Flight = begin(*learned, *_one_row(prompt), count=count)
    jax.block_until_ready(step(flight))
    yield []
    shown, stop = len(prompt), flight.stop.item()
    while True:
        read = flight.read.item()
        # Not a slice of a JAX array, which is compiled for every new length.
        yield np.asarray(flight.rows)[0, shown : read + 1].tolist()
        if read == stop:
            return
        shown = read + 1
        flight, _ = step(flight)


def _one_row(prompt: Sequence[int]) -> tuple[Int[Array, "1 S"], Int[Array, "1"]]:
    return jnp.asarray([prompt], jnp.int32), jnp.asarray([len(prompt)], jnp.int32)


def whole_characters(
    tokenizer: Tokenizer, tokens: Iterator[list[int]], eos: int
) -> Iterator[str]:
    """Decodes tokens up to the end of text; a character comes when it is whole."""
    ids: list[int] = []
    shown = 0
    for chunk in tokens:
        ids += itertools.takewhile(lambda token: token != eos, chunk)
        text = tokenizer.decode(ids)
        ready = len(text.rstrip(UNFINISHED))
        yield text[shown:ready]
        shown = max(shown, ready)
        if eos in chunk:
            break
    yield tokenizer.decode(ids)[shown:]


def write(trained: Trained, options: argparse.Namespace, sampling: Sampling) -> None:
    """Writes the prompt and what follows; says on stderr how fast it was."""
    prompt = trained.encode(options.prompt)
    if len(prompt) + options.tokens > trained.length:
        _say(
            f"note: the model was trained on {trained.length} tokens at a time; "
            f"{len(prompt)} of the prompt and {options.tokens} more go beyond that"
        )
    chunks = (
        stream_drafts(trained, prompt, options.tokens)
        if options.speculative
        else stream_tokens(trained, prompt, options.tokens, sampling, options.seed)
    )
    counts: list[int] = []
    begun = time.perf_counter()

    def counted() -> Iterator[list[int]]:
        nonlocal begun
        for chunk in chunks:
            if not chunk:
                begun = time.perf_counter()
            else:
                counts.append(len(chunk))
            yield chunk

    eos = end_of_text(trained.tokenizer)
    sys.stdout.write(options.prompt)
    for text in whole_characters(trained.tokenizer, counted(), eos):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.perf_counter() - begun
    calls = f", {sum(counts) / len(counts):.2f} a call" if options.speculative else ""
    _say(
        f"{sum(counts)} tokens{calls}, {sum(counts) / seconds:,.0f} tokens/s, from the "
        f"checkpoint of step {trained.step}"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, Sampling]:
    """Reads the command line.

    Raises:
      TrainingError: flags that contradict each other, or a prompt that cannot be read.
      ValueError: a flag out of its range.
    """
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description="Continue a prompt with a trained model.",
        allow_abbrev=False,
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--prompt", default="", help="text to continue; - for stdin")
    parser.add_argument("--prompt-file", type=Path, help="file to continue")
    parser.add_argument("--tokens", type=int, default=200, help="how many to make")
    parser.add_argument("--temperature", type=float, help="default 0.8")
    parser.add_argument("--top-k", type=int, help="default 40")
    parser.add_argument("--top-p", type=float, help="default 1, all of them")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest")
    parser.add_argument(
        "--speculative", action="store_true", help="draft with the further heads"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--step", type=int, help="of the checkpoint; default the last")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise TrainingError(f"--tokens must be at least 1, got {options.tokens}")
    sampling = _sampling(options)
    options.prompt = _prompt(options)
    return options, sampling


def _sampling(options: argparse.Namespace) -> Sampling:
    given = [
        flag
        for flag in ("temperature", "top_k", "top_p")
        if getattr(options, flag) is not None
    ]
    if options.speculative and not options.greedy:
        raise TrainingError(
            "--speculative makes the likeliest tokens: pass --greedy as well"
        )
    if options.greedy and given:
        flags = ", ".join(f"--{flag.replace('_', '-')}" for flag in given)
        raise TrainingError(f"--greedy takes the likeliest token: leave out {flags}")
    if options.greedy:
        return GREEDY
    defaults = {"temperature": 0.8, "top_k": 40, "top_p": 1.0}
    return Sampling(**(defaults | {flag: getattr(options, flag) for flag in given}))


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is not None:
        if options.prompt:
            raise TrainingError("pass --prompt or --prompt-file, not both")
        try:
            return options.prompt_file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(
                f"cannot read --prompt-file {options.prompt_file}: {error}"
            ) from error
    return sys.stdin.read() if options.prompt == "-" else options.prompt


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    try:
        options, sampling = parse(arguments)
        write(load(options.run, options.step), options, sampling)
    except (TrainingError, ValueError, OSError) as error:
        _say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

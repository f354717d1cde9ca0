"""Continues a prompt with a trained model and prints the text as it is generated.

    python examples/generate.py runs/demo --prompt "def "
    python examples/generate.py runs/demo --prompt "def " --greedy --speculative

It reads the newest checkpoint and does not disturb a running trainer. The text goes to
stdout, everything else to stderr. Exit code 1: an error, explained on stderr. 130:
Ctrl-C.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.data.text import end_of_text
from trainer.decode.decoder import GREEDY, Sampling
from trainer.decode.stream import stream_drafts, stream_tokens, whole_characters
from trainer.errors import TrainingError
from trainer.run.trained import Trained, load


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

    def timed() -> Iterator[list[int]]:
        nonlocal begun
        for chunk in chunks:
            if not chunk:
                begun = time.perf_counter()
            else:
                counts.append(len(chunk))
            yield chunk

    eos = end_of_text(trained.tokenizer)
    sys.stdout.write(options.prompt)
    for text in whole_characters(trained.tokenizer, timed(), eos):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    seconds = time.perf_counter() - begun
    calls = f", {sum(counts) / len(counts):.2f} a call" if options.speculative else ""
    _say(
        f"{sum(counts)} tokens{calls}, {sum(counts) / seconds:,.0f} tokens/s, from the "
        f"checkpoint of step {trained.step}"
    )
    if trained.temperature != 1:
        _say(
            f"the model was trained at temperature {trained.temperature:.4g}, which is "
            "part of it: --temperature is relative to that"
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
            return options.prompt_file.read_text("utf-8-sig")
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

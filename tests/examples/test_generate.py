"""The command that continues a prompt: its text, its flags, its errors."""

import io
import itertools
import shutil

import pytest

from generate import main, parse
from trainer.data.text import end_of_text
from trainer.decode.stream import stream_drafts, stream_tokens, whole_characters
from trainer.run.trained import load


def test_drafts_make_the_same_text(demo_run, capsys):
    texts = []
    for flags in (["--greedy"], ["--greedy", "--speculative"]):
        command = [str(demo_run), "--prompt", "alpha be", "--tokens", "20", *flags]
        assert main(command) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "tokens/s, from the checkpoint of step 20" in err
        assert ("a call" in err) == ("--speculative" in flags)
    assert texts[0] == texts[1]
    assert texts[0].startswith("alpha be")
    assert len(texts[0]) > len("alpha be\n")


def test_chunks_add_up_to_the_tokens_wanted(demo_run):
    trained = load(demo_run)
    prompt = trained.encode("beta")
    assert prompt[0] == end_of_text(trained.tokenizer)
    _, sampling = parse(["x", "--greedy"])
    one_by_one = list(stream_tokens(trained, prompt, 9, sampling, seed=0))
    drafted = list(stream_drafts(trained, prompt, 9))
    assert [len(chunk) for chunk in one_by_one] == [0, *[1] * 9]
    joined = itertools.chain.from_iterable
    assert list(joined(drafted)) == list(joined(one_by_one))


def test_a_seed_decides_what_is_drawn(demo_run, capsys):
    def text(*flags: str) -> str:
        command = [str(demo_run), "--tokens", "25", "--temperature", "2", *flags]
        assert main(command) == 0
        return capsys.readouterr().out

    assert text() == text()
    assert text() != text("--seed", "1")
    assert text("--top-k", "1") == text("--top-k", "1", "--seed", "1")


def test_an_older_checkpoint_may_be_named(demo_run, capsys):
    assert main([str(demo_run), "--tokens", "2", "--step", "10"]) == 0
    assert "step 10" in capsys.readouterr().err
    assert main([str(demo_run), "--tokens", "2", "--step", "4"]) == 1
    assert "no checkpoint of step 4, but of 10, 20" in capsys.readouterr().err


def test_a_prompt_comes_from_a_file_or_stdin(demo_run, tmp_path, capsys, monkeypatch):
    path = tmp_path / "prompt.txt"
    path.write_text("gamma ")
    assert main([str(demo_run), "--tokens", "2", "--prompt-file", str(path)]) == 0
    assert capsys.readouterr().out.startswith("gamma ")
    monkeypatch.setattr("sys.stdin", io.StringIO("delta "))
    assert main([str(demo_run), "--tokens", "2", "--prompt", "-"]) == 0
    assert capsys.readouterr().out.startswith("delta ")


def test_more_tokens_than_it_was_trained_on_are_said(demo_run, capsys):
    assert main([str(demo_run), "--tokens", "40"]) == 0
    assert "trained on 32 tokens at a time" in capsys.readouterr().err


def test_half_a_character_waits_for_its_other_half(demo_run):
    tokenizer = load(demo_run).tokenizer
    ids = tokenizer.encode("aé🙂b").ids
    eos = end_of_text(tokenizer)
    chunks = iter([[token] for token in [*ids, eos, *ids]])
    pieces = list(whole_characters(tokenizer, chunks, eos))
    assert "".join(pieces) == "aé🙂b"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    cut = list(whole_characters(tokenizer, iter([ids[:2]]), eos))
    assert "".join(cut) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--speculative"], "pass --greedy"),
        (["--greedy", "--top-k", "3", "--temperature", "1"], "--temperature, --top-k"),
        (["--tokens", "0"], "--tokens must be at least 1"),
        (["--top-p", "0"], "top_p must lie in"),
        (["--prompt", "a", "--prompt-file", "b"], "not both"),
        (["--prompt-file", "nowhere"], "cannot read --prompt-file"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, message, capsys):
    assert main(["nowhere", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_explained(demo_run, tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "is no run of the trainer" in capsys.readouterr().err
    young = tmp_path / "young"
    shutil.copytree(demo_run, young, ignore=shutil.ignore_patterns("step_*"))
    assert main([str(young)]) == 1
    assert "has no checkpoint yet" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(demo_run, broken)
    largest = max(
        (broken / "checkpoints" / "step_00000020").rglob("*"),
        key=lambda path: path.stat().st_size if path.is_file() else 0,
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    assert main([str(broken)]) == 1
    assert "is corrupt" in capsys.readouterr().err


def test_a_checkpoint_being_written_is_left_alone(demo_run, tmp_path):
    busy = tmp_path / "busy"
    shutil.copytree(demo_run, busy)
    partial = busy / "checkpoints" / "step_00000030.orbax-checkpoint-tmp"
    partial.mkdir()
    assert load(busy).step == 20
    assert partial.exists()

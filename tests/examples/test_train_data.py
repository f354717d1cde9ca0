"""Reading text and packing it: nothing lost, nothing crosses a document."""

import gzip
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from trainer.data import text
from trainer.data.corpus import Corpus, load_corpus
from trainer.data.text import (
    Feed,
    PackedRows,
    TextData,
    load_tokenizer,
    prepare_data,
    split,
    tokenize,
)
from trainer.data.tokens import TokenFile
from trainer.errors import TrainingError
from trainer.files import find_corrupt, read_raw, read_text

EOS = 9
FLIPPED = bytearray(gzip.compress(b"text of a file" * 99, mtime=0))
FLIPPED[12] ^= 0xFF
# What str.splitlines takes for the end of a line.
BREAKS = "\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def stream(*documents: list[int]) -> np.ndarray:
    pieces = [EOS]
    for document in documents:
        pieces += [*document, EOS]
    return np.array(pieces, np.int32)


def test_a_row_shifts_targets_and_restarts_segments_and_positions() -> None:
    rows = PackedRows(stream([1, 2, 3], [4, 5]), EOS, 5)
    assert len(rows) == 2
    first, second = rows[0], rows[1]
    assert first.inputs.tolist() == [EOS, 1, 2, 3, EOS]
    assert first.targets.tolist() == [1, 2, 3, EOS, 4]
    assert first.segment_ids.tolist() == [1, 1, 1, 1, 2]
    assert first.positions.tolist() == [0, 1, 2, 3, 0]
    assert second.inputs.tolist()[:2] == [4, 5]
    assert second.targets.tolist()[:2] == [5, EOS]
    assert second.segment_ids.tolist() == [1, 1, 0, 0, 0]
    assert second.positions.tolist()[:2] == [0, 1]


@pytest.mark.parametrize("length", [1, 2, 3, 7, 50])
def test_every_token_is_a_target_once_from_its_own_document(length: int) -> None:
    documents = [[1, 2, 3], [4], [5, 6, 7, 8], [1, 1]]
    whole = stream(*documents)
    owner = np.repeat(np.arange(4), [len(d) + 1 for d in documents])
    rows = PackedRows(whole, EOS, length)
    targets: list[int] = []
    seen = 0
    for row in (rows[i] for i in range(len(rows))):
        unmasked = row.segment_ids > 0
        targets += row.targets[unmasked].tolist()
        owners = owner[seen : seen + unmasked.sum()]
        seen += unmasked.sum()
        # Equal segments within a row exactly where the owning document is equal.
        same = row.segment_ids[unmasked][:, None] == row.segment_ids[unmasked]
        np.testing.assert_array_equal(same, owners[:, None] == owners)
    assert targets == whole[1:].tolist()


def corpus_of(*documents: str) -> Corpus:
    return Corpus("test", documents, f"{hash(documents):064x}"[-64:], 0)


def prepare(corpus: Corpus, cache: Path, length: int = 8) -> TextData:
    return prepare_data(corpus, cache, 280, length, 0.25)


def test_heldout_rows_are_the_end_and_training_never_sees_them(tmp_path: Path) -> None:
    data = prepare(corpus_of(*["a b c d e f g h"] * 20), tmp_path)
    total = len(data.train) + len(data.heldout)
    assert len(data.heldout) == round(total / 4)
    unmasked = sum(
        int((data.train[i].segment_ids > 0).sum()) for i in range(len(data.train))
    )
    assert unmasked == len(data.train) * 8
    held = sum(
        int((data.heldout[i].segment_ids > 0).sum()) for i in range(len(data.heldout))
    )
    assert unmasked + held == data.tokens


def test_the_last_heldout_batch_is_filled_with_padding(tmp_path: Path) -> None:
    data = prepare(corpus_of(*["a b c d e f g h"] * 20), tmp_path)
    batches = list(data.heldout_batches(4, limit=100))
    assert all(batch.inputs.shape == (4, 8) for batch in batches)
    rows = sum(int(batch.segment_ids.any(axis=1).sum()) for batch in batches)
    assert rows == len(data.heldout)


def test_the_iterator_goes_on_where_its_state_says(tmp_path: Path) -> None:
    data = prepare(corpus_of(*["some words of text " * 9] * 20), tmp_path)
    one, two = data.batches(4, seed=3), data.batches(4, seed=3)
    for _ in range(5):
        next(one)
    two.set_state(json.loads(json.dumps(one.get_state())))
    np.testing.assert_array_equal(next(one).inputs, next(two).inputs)
    other = data.batches(4, seed=4)
    assert not np.array_equal(next(data.batches(4, seed=3)).inputs, next(other).inputs)


def test_processes_read_their_own_rows_of_the_same_batches(tmp_path: Path) -> None:
    data = prepare(corpus_of(*["some words of text " * 9] * 20), tmp_path)
    whole = data.batches(4, seed=3)
    parts = [data.batches(4, seed=3, row_ids=ids) for ids in ([0, 1], [2], [3])]
    for _ in range(30):
        rows = [next(part).targets for part in parts]
        np.testing.assert_array_equal(np.concatenate(rows), next(whole).targets)
        assert all(part.get_state() == whole.get_state() for part in parts)


def test_processes_share_the_heldout_rows_too(tmp_path: Path) -> None:
    data = prepare(corpus_of(*["a b c d e f g h"] * 20), tmp_path)
    whole = data.heldout_batches(4, limit=100)
    parts = [data.heldout_batches(4, 100, ids) for ids in ([0, 1, 2], [3])]
    for batch, *shares in zip(whole, *parts, strict=True):
        for name in batch._fields:
            joined = np.concatenate([getattr(share, name) for share in shares])
            np.testing.assert_array_equal(joined, getattr(batch, name))


def test_a_row_reads_its_own_tokens_alone(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(np.arange(1000, dtype="<i4").tobytes())
    rows = PackedRows(TokenFile(path), 999, 10)
    with path.open("r+b") as file:
        file.truncate(4 * 111)
    assert rows[10].targets.tolist() == list(range(101, 111))
    with pytest.raises(TrainingError, match=r"tokens\.bin: it has shrunk below 1000"):
        rows[11]


def test_a_failure_waits_until_the_batches_before_it_are_used(tmp_path: Path) -> None:
    path = tmp_path / "tokens.bin"
    path.write_bytes(np.arange(1001, dtype="<i4").tobytes())
    rows = PackedRows(TokenFile(path), 0, 10)
    valid, broken = Feed(rows, 2, 0, None), Feed(rows, 2, 0, None)
    order = [next(valid).inputs[:, 0] // 10 for _ in range(50)]
    with path.open("r+b") as file:
        file.truncate(4 * 1000)
    bad = next(i for i, batch in enumerate(order) if batch.max() == 99)
    seen = 0
    while broken.failure is None:
        np.testing.assert_array_equal(next(broken).inputs[:, 0] // 10, order[seen])
        seen += 1
    assert seen == bad > 0
    state = broken.get_state()
    with pytest.raises(TrainingError, match="shrunk"):
        next(broken)
    valid.set_state(state)
    path.write_bytes(np.arange(1001, dtype="<i4").tobytes())
    np.testing.assert_array_equal(next(valid).inputs[:, 0] // 10, order[bad])


def test_text_survives_the_tokenizer_and_cannot_spell_the_end(tmp_path: Path) -> None:
    text = "héllo <|endoftext|> wörld"
    data = prepare(corpus_of(text, *["padding words here"] * 9), tmp_path)
    ids = data.tokenizer.encode(text).ids
    assert data.eos == data.vocab_size - 1
    assert data.eos not in ids
    assert data.tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json", "sha256.json"])
def test_the_cache_gives_the_same_and_survives_a_flipped_bit(
    tmp_path: Path, name: str
) -> None:
    corpus = corpus_of(*["one two three four five"] * 20)
    expected = prepare(corpus, tmp_path).train[1].inputs
    (stored,) = tmp_path.rglob(name)
    written = stored.stat().st_mtime_ns
    np.testing.assert_array_equal(prepare(corpus, tmp_path).train[1].inputs, expected)
    assert stored.stat().st_mtime_ns == written, "made again without need"
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    np.testing.assert_array_equal(prepare(corpus, tmp_path).train[1].inputs, expected)
    assert stored.stat().st_mtime_ns != written


LONG = {
    "words": "ab  cd's 12,\n\n\t x\u3000y!'s é <|endoftext|> ",
    "no space": "中文字、再一句。abc123!?é",
    "newlines": "line\r\n\n\nanother\tone\n",
    "white space": " \n\t x",
}


@pytest.mark.parametrize("name", LONG)
def test_the_parts_of_a_document_have_the_ids_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    rng = np.random.default_rng(0)
    document = "".join(rng.choice([*LONG[name]], 4000))
    corpus = corpus_of(document, "a short one", document[::-1], "")
    tokenize(corpus, tmp_path / "whole", 400)
    monkeypatch.setattr(text, "PART", 60)
    monkeypatch.setattr(text, "TAIL", 20)
    splitter = ByteLevel(add_prefix_space=False)
    parts = split(document, splitter)
    assert "".join(parts) == document
    assert max(map(len, parts)) <= 60
    assert len(parts) > 60
    # Each part is a number of whole pieces of the document.
    starts = {first for _, (first, _) in splitter.pre_tokenize_str(document)}
    assert set(np.cumsum([len(part) for part in parts])[:-1].tolist()) <= starts
    tokenize(corpus, tmp_path / "parts", 400)
    for file in ("tokenizer.json", "tokens.bin"):
        whole, cut = (tmp_path / folder / file for folder in ("whole", "parts"))
        assert whole.read_bytes() == cut.read_bytes()


def test_a_word_longer_than_a_part_is_cut_within(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(text, "PART", 60)
    monkeypatch.setattr(text, "TAIL", 20)
    document = "a" * 100 + " b" + " " * 100
    parts = split(document, ByteLevel(add_prefix_space=False))
    assert "".join(parts) == document
    assert parts[0] == "a" * 60
    assert max(map(len, parts)) <= 60


def test_the_memory_of_tokenizing_does_not_grow_with_a_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    gather = text._batches

    def watched(parts: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
        for batch in gather(parts):
            sizes.append(sum(len(part) for part, _ in batch))
            yield batch

    monkeypatch.setattr(text, "_batches", watched)
    monkeypatch.setattr(text, "PART", 1000)
    tokenize(corpus_of("some words " * 3000, *["short"] * 900), tmp_path / "c", 300)
    assert sum(sizes) == 33_000 + 4500
    assert max(sizes) <= 2000


def test_too_little_text_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="too few"):
        prepare(corpus_of("ab"), tmp_path, length=64)


def test_a_vocabulary_smaller_than_the_bytes_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least 257"):
        prepare_data(corpus_of("abc"), tmp_path, 200, 8, 0.1)


def test_jsonl_gz_and_folders_hold_the_same_documents(tmp_path: Path) -> None:
    texts = ["first", "second\nline", "third"]
    lines = "\n".join(json.dumps({"text": text, "n": 1}) for text in texts)
    plain, packed = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text(lines + "\n\n")
    packed.write_bytes(gzip.compress(lines.encode(), mtime=0))
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "1.txt").write_text(texts[0])
    (folder / "2.md").write_text(texts[1])
    (folder / "deep" / "3.txt.gz").write_bytes(
        gzip.compress(texts[2].encode(), mtime=0)
    )
    (folder / ".hidden").write_text("no")
    corpora = [load_corpus(path) for path in (plain, packed, folder)]
    assert sorted(corpora[0].documents) == sorted(texts)
    assert len({corpus.sha256 for corpus in corpora}) == 1


def test_binary_files_of_a_folder_are_counted_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\xff\xfe")
    corpus = load_corpus(tmp_path)
    assert corpus.documents == ("text",)
    assert "1 not UTF-8" in corpus.describe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}', 'line 2: needs .* "text"'),
        ("a.jsonl", b"{", "line 1: not JSON"),
        ("a.txt.gz", b"not gzip", "whole gzip"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "whole gzip"),
        ("a.txt.gz", FLIPPED, r"a\.txt\.gz is not a whole gzip"),
        ("a.jsonl", b"[" * 200_000, "line 1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}', r"line 2: .*half a char"),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        load_corpus(path)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_of_jsonl_ends_at_a_newline_only(
    tmp_path: Path, mark: str, end: str
) -> None:
    texts = [f"before{character}after" for character in BREAKS]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    # JSON itself has control characters escaped, and these two are all else.
    assert any("\u2028" in line for line in lines)
    path = tmp_path / "a.jsonl"
    path.write_bytes((mark + end.join(lines) + end).encode())
    assert sorted(load_corpus(path).documents) == sorted(texts)


def test_what_would_keep_a_reader_waiting_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo):
        with pytest.raises((TrainingError, OSError), match=str(fifo)):
            load_corpus(path)
    # Whatever the trainer reads, it reads through these.
    for reader in (read_raw, read_text, load_tokenizer):
        with pytest.raises((TrainingError, OSError), match=str(fifo)):
            reader(fifo)


def test_a_manifest_that_is_nested_deeply_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "sha256.json").write_text("[" * 200_000)
    assert find_corrupt(tmp_path)
    (tmp_path / "sha256.json").write_text("[]")
    assert find_corrupt(tmp_path)


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(TrainingError, match=str(path)):
        load_tokenizer(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"no such file.*nowhere"):
        load_corpus(tmp_path / "nowhere")


def test_the_default_is_the_standard_library_without_its_tests() -> None:
    corpus = load_corpus(None)
    assert corpus.size > 1_000_000
    assert any("class JSONDecoder" in document for document in corpus.documents)
    assert corpus.sha256 == load_corpus(None).sha256

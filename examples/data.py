"""Text to batches: a byte-level BPE, packed rows with segments, a grain pipeline."""

import dataclasses
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from corpus import Corpus
from errors import TrainingError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and the end of text


class Rows(NamedTuple):
    """One packed row [S] or several [B, S], int32, in the host's memory.

    `targets` is `inputs` one token later. Segment 0 is padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class PackedRows(grain.sources.RandomAccessDataSource[Rows]):
    """Rows cut out of one long stream `EOS doc EOS doc … EOS`.

    A document's first input is the EOS before it, and its last target the EOS after
    it, so that every token is predicted once, from its own document alone. Segments
    count from 1 in each row; positions count from 0 in each segment. Only the last row
    can have padding, which is segment 0.
    """

    def __init__(self, stream: np.ndarray, eos: int, length: int) -> None:
        self._stream = stream
        self._eos = eos
        self._length = length

    def __len__(self) -> int:
        return -(-(len(self._stream) - 1) // self._length)

    def __getitem__(self, index: int) -> Rows:
        index = int(index)
        length, eos = self._length, self._eos
        piece = self._stream[index * length : (index + 1) * length + 1]
        counted = np.arange(length) < len(piece) - 1
        padded = np.full(length + 1, eos, np.int32)
        padded[: len(piece)] = piece
        inputs, targets = padded[:-1], padded[1:]
        starts = (inputs == eos) & counted
        starts[0] = True
        slots = np.arange(length, dtype=np.int32)
        first = np.maximum.accumulate(np.where(starts, slots, 0))
        segments = np.where(counted, np.cumsum(starts), 0)
        return Rows(
            inputs, targets, segments.astype(np.int32), (slots - first).astype(np.int32)
        )


@dataclasses.dataclass(frozen=True)
class TextData:
    """A tokenizer, and the rows for training and for evaluation."""

    tokenizer: Tokenizer
    train: PackedRows
    heldout: PackedRows
    tokens: int

    @property
    def vocab_size(self) -> int:
        """V, with the end of text as the last id."""
        return self.tokenizer.get_vocab_size()

    @property
    def eos(self) -> int:
        """The id of the end of text."""
        return end_of_text(self.tokenizer)

    def batches(self, size: int, seed: int) -> grain.DatasetIterator[Rows]:
        """Returns endless shuffled batches; the iterator's state can be saved."""
        rows = grain.MapDataset.source(self.train).seed(seed).shuffle().repeat()
        return iter(rows.batch(size, drop_remainder=True).to_iter_dataset())

    def heldout_batches(self, size: int, limit: int) -> Iterator[Rows]:
        """Yields the first held-out rows; the last batch is filled with padding."""
        rows = [self.heldout[i] for i in range(min(len(self.heldout), size * limit))]
        blank = Rows(*(np.zeros_like(array) for array in rows[0]))
        rows += [blank] * (-len(rows) % size)
        for start in range(0, len(rows), size):
            yield Rows(*map(np.stack, zip(*rows[start : start + size], strict=True)))


def prepare_data(
    corpus: Corpus, cache: Path, vocab_size: int, length: int, heldout: float
) -> TextData:
    """Tokenizes the corpus (both steps cached) and cuts it into rows.

    Args:
      corpus: the documents.
      cache: folder for the tokenizer and the token stream, named by the corpus's
        sha256 and the vocabulary size.
      vocab_size: the largest V wanted; little text gives a smaller one.
      length: tokens per row (S).
      heldout: share of the rows, at the end, that training never sees.

    Raises:
      TrainingError: too little text for one row of each kind.
    """
    folder = cache / f"{corpus.sha256[:16]}-{vocab_size}"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(corpus, folder / "tokenizer.json", vocab_size)
    stream = load_stream(corpus, folder / "tokens.npz", tokenizer)
    eos = end_of_text(tokenizer)
    rows = PackedRows(stream, eos, length)
    if len(rows) < 2:
        raise TrainingError(
            f"{corpus.name} has {len(stream) - 1} tokens, too few for one row of "
            f"{length} to train on and one to hold out: add text or lower "
            "--sequence-length"
        )
    cut = len(rows) - max(1, round(len(rows) * heldout))
    return TextData(
        tokenizer=tokenizer,
        train=PackedRows(stream[: cut * length + 1], eos, length),
        heldout=PackedRows(stream[cut * length :], eos, length),
        tokens=len(stream) - 1,
    )


def load_tokenizer(corpus: Corpus, path: Path, vocab_size: int) -> Tokenizer:
    """Returns the cached tokenizer, or trains a byte-level BPE on the corpus."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise TrainingError(
            f"--vocab-size must be at least {SMALLEST_VOCABULARY} (the bytes and the "
            f"end of text), got {vocab_size}"
        )
    if not path.exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(corpus.documents, trainer)
        tokenizer.add_special_tokens([END_OF_TEXT])
        _write_whole(path, tokenizer.to_str().encode())
    tokenizer = Tokenizer.from_file(str(path))
    # The end of text spelled out inside a document is ordinary text.
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Returns the id of the end of text, the last one."""
    return tokenizer.get_vocab_size() - 1


def load_stream(corpus: Corpus, path: Path, tokenizer: Tokenizer) -> np.ndarray:
    """Returns `EOS doc EOS doc … EOS` as int32, cached."""
    try:
        with np.load(path) as cached:
            return cached["stream"]
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError):
        eos = np.array([end_of_text(tokenizer)], np.int32)
        pieces = [eos]
        for encoding in tokenizer.encode_batch(list(corpus.documents)):
            pieces += [np.array(encoding.ids, np.int32), eos]
        stream = np.concatenate(pieces)
    part = path.with_name(f"{path.stem}.{os.getpid()}.npz")
    np.savez(part, stream=stream)
    part.replace(path)
    return stream


def _write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that nobody ever sees half of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(content)
    part.replace(path)

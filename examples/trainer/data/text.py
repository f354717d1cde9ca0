"""Text to batches: a byte-level BPE, packed rows with segments, a grain pipeline."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.corpus import Corpus
from trainer.data.tokens import TokenFile, Tokens, tokens_to_bytes
from trainer.errors import TrainingError
from trainer.files import (
    find_corrupt,
    locked,
    make_empty,
    read_text,
    write_manifest,
    write_whole,
)

END_OF_TEXT = "<|endoftext|>"
TOKENIZER = "tokenizer.json"
TOKENS = "tokens.bin"
# Characters tokenized at a time, and those at their end where a cut is looked for.
PART, TAIL = 2**18, 2**12
SMALLEST_VOCABULARY = 257  # every byte, and the end of text


class Rows(NamedTuple):
    """One packed row [S] or several [B, S], int32, in the host's memory.

    `targets` is `inputs` one token later. Segment 0 is padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


class PackedRows:
    """Rows cut from one long token stream `EOS doc EOS doc … EOS`.

    A document's first input is the EOS before it, and its last target the EOS after
    it, so that every token is predicted once, from its own document alone. Segments
    count from 1 in each row; positions count from 0 in each segment. Only the last row
    can have padding, which is segment 0.

    Grain's packing transforms iterate over documents. Rows here are random access: they
    are shuffled by number, the last ones are held out, and each process reads only its
    own.

    Args:
      stream: the tokens; a row reads its own and no others.
      eos: the id that stands between documents.
      length: tokens per row (S).
      rows: which of the stream's rows these are; by default all.
    """

    def __init__(
        self, stream: Tokens, eos: int, length: int, rows: range | None = None
    ) -> None:
        self._stream = stream
        self._eos = eos
        self._length = length
        self._rows = range(-(-(len(stream) - 1) // length)) if rows is None else rows

    def __len__(self) -> int:
        return len(self._rows)

    def part(self, rows: slice) -> "PackedRows":
        """Returns a slice of these rows."""
        return PackedRows(self._stream, self._eos, self._length, self._rows[rows])

    def __getitem__(self, index: int) -> Rows:
        length, eos = self._length, self._eos
        start = self._rows[index] * length
        piece = self._stream[start : start + length + 1]
        unpadded = np.arange(length) < len(piece) - 1
        padded = np.full(length + 1, eos, np.int32)
        padded[: len(piece)] = piece
        inputs, targets = padded[:-1], padded[1:]
        starts = (inputs == eos) & unpadded
        starts[0] = True
        slots = np.arange(length, dtype=np.int32)
        first = np.maximum.accumulate(np.where(starts, slots, 0))
        segments = np.where(unpadded, np.cumsum(starts), 0)
        return Rows(
            inputs, targets, segments.astype(np.int32), (slots - first).astype(np.int32)
        )

    def read(self, indices: Sequence[int]) -> Rows:
        """Returns a batch of rows; an index past the end gives a row of padding."""
        blank = Rows(*(np.zeros(self._length, np.int32) for _ in Rows._fields))
        rows = [self[i] if i < len(self) else blank for i in indices]
        return Rows(*map(np.stack, zip(*rows, strict=True)))


DataState = dict[str, object]


class Feed:
    """Endless shuffled batches, of which this process reads its own rows.

    The order is that of row numbers, which all processes draw alike; so what a run sees
    does not depend on how many there are. One batch is read ahead, so that a failure is
    known while there is still a batch to train on, and all processes can stop together.

    Args:
      rows: to draw from.
      size: rows of a batch (B), over all processes.
      row_ids: which of the batch's rows to read; by default all.
      seed: of the order.
    """

    def __init__(
        self, rows: PackedRows, size: int, seed: int, row_ids: Sequence[int] | None
    ) -> None:
        own = np.arange(size) if row_ids is None else np.array(row_ids)
        order = grain.MapDataset.range(len(rows)).seed(seed).shuffle().repeat()
        batches = order.batch(size, drop_remainder=True)
        reader = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
        read = batches.map(lambda numbers: rows.read(numbers[own].tolist()))
        self._batches = iter(read.to_iter_dataset(reader))
        self._state: DataState = self._batches.get_state()
        self._ahead: Rows | None = None
        self.failure: TrainingError | None = None

    def __next__(self) -> Rows:
        rows = self._ahead or self._read()
        if rows is None:
            raise self.failure or StopIteration
        self._state = self._batches.get_state()
        self._ahead = self._read()
        return rows

    def _read(self) -> Rows | None:
        """Reads a batch; None after a failure."""
        if self.failure is None:
            try:
                return next(self._batches)
            except TrainingError as failure:
                self.failure = failure
        return None

    def get_state(self) -> DataState:
        """Returns the state after the last batch that was handed out."""
        return self._state

    def set_state(self, state: DataState) -> None:
        """Continues from a state that `get_state` returned."""
        self._batches.set_state(state)
        self._state, self._ahead, self.failure = state, None, None


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

    def batches(
        self, size: int, seed: int, row_ids: Sequence[int] | None = None
    ) -> Feed:
        """Returns endless shuffled batches, whose state can be saved."""
        return Feed(self.train, size, seed, row_ids)

    def heldout_batches(
        self, size: int, limit: int, row_ids: Sequence[int] | None = None
    ) -> Iterator[Rows]:
        """Yields the first held-out rows; the last batch is filled with padding."""
        own = range(size) if row_ids is None else row_ids
        for batch in range(min(limit, -(-len(self.heldout) // size))):
            yield self.heldout.read([batch * size + row for row in own])


def prepare_data(
    corpus: Corpus, cache: Path, vocab_size: int, length: int, heldout: float
) -> TextData:
    """Tokenizes the corpus, unless the cache has it, and cuts it into rows.

    Of the processes of a machine one tokenizes and the others wait for it.

    Args:
      corpus: the documents.
      cache: folder for the tokenizer and the token stream, named by the corpus's
        sha256 and the vocabulary size.
      vocab_size: the largest V wanted; little text gives a smaller one.
      length: tokens per row (S).
      heldout: share of the rows, at the end, that training never sees.

    Raises:
      TrainingError: too little text for one row of each kind, a vocabulary that
        cannot spell it, or a cache folder that cannot be written.
    """
    check_vocab_size(vocab_size)
    name = f"{corpus.sha256[:16]}-{vocab_size}"
    folder = cache / name
    with locked(cache / f"{name}.lock"):
        if find_corrupt(folder):
            tokenize(corpus, folder, vocab_size)
    tokenizer = load_tokenizer(folder / TOKENIZER)
    stream = TokenFile(folder / TOKENS)
    rows = PackedRows(stream, end_of_text(tokenizer), length)
    if len(rows) < 2:
        raise TrainingError(
            f"{corpus.name} has {len(stream) - 1} tokens, too few for one row of "
            f"{length} to train on and one to hold out: add text or lower "
            "--sequence-length"
        )
    cut = len(rows) - max(1, round(len(rows) * heldout))
    return TextData(
        tokenizer=tokenizer,
        train=rows.part(slice(cut)),
        heldout=rows.part(slice(cut, None)),
        tokens=len(stream) - 1,
    )


def check_vocab_size(vocab_size: int) -> None:
    """Refuses a vocabulary that cannot spell every text."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise TrainingError(
            f"--vocab-size must be at least {SMALLEST_VOCABULARY} (the bytes and the "
            f"end of text), got {vocab_size}"
        )


def tokenize(corpus: Corpus, folder: Path, vocab_size: int) -> None:
    """Trains a byte-level BPE on the corpus, and writes it and the token stream."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = [split(text, tokenizer.pre_tokenizer) for text in corpus.documents]
    tokenizer.train_from_iterator(itertools.chain(*documents), trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    # The end of text spelled out inside a document is ordinary text.
    tokenizer.encode_special_tokens = True
    eos = np.array([end_of_text(tokenizer)], np.int32)
    pieces = [eos]
    parts = ((part, i) for i, document in enumerate(documents) for part in document)
    last = 0
    for batch in _batches(parts):
        encodings = tokenizer.encode_batch([part for part, _ in batch])
        for encoding, (_, number) in zip(encodings, batch, strict=True):
            if number != last:
                pieces.append(eos)
            pieces.append(np.array(encoding.ids, np.int32))
            last = number
    pieces.append(eos)
    make_empty(folder)
    write_whole(folder / TOKENIZER, tokenizer.to_str())
    write_whole(folder / TOKENS, tokens_to_bytes(pieces))
    write_manifest(folder)


def split(text: str, pre_tokenizer: pre_tokenizers.PreTokenizer) -> list[str]:
    """Cuts a long document where the pre-tokenizer splits it, too.

    So the parts have the ids of the whole. Only where the pre-tokenizer finds no place
    in `PART` characters (one word, one run of spaces or of signs as long as that) it is
    cut within, and the ids at the cut can differ.

    A pre-tokenizer matches from left to right and looks one character ahead; so the
    places it finds before its last piece are those that it finds in the whole.
    """
    parts: list[str] = []
    start = 0
    while len(text) - start > PART:
        end = _cut(text, start, start + PART, pre_tokenizer)
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]] if parts else [text]


def _cut(
    text: str, start: int, end: int, pre_tokenizer: pre_tokenizers.PreTokenizer
) -> int:
    """Returns the last place before `end` where the pre-tokenizer splits, or `end`."""
    # A space begins a piece whatever comes before it; from there on, all is as in the
    # whole. To look at a tail is faster, and is enough but for text without spaces.
    for begin in (text.rfind(" ", start, max(start, end - TAIL)), start):
        if begin >= start:
            pieces = pre_tokenizer.pre_tokenize_str(text[begin:end])
            for _, (place, _) in reversed(pieces[1:]):
                # White space is split by what follows it, so no part ends in it.
                if not text[begin + place - 1].isspace():
                    return begin + place
    return end


def _batches(parts: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Gathers parts up to about `PART` characters."""
    batch: list[tuple[str, int]] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= PART:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def load_tokenizer(path: Path) -> Tokenizer:
    """Returns a tokenizer that encodes a spelled-out end of text as ordinary text."""
    try:
        tokenizer = Tokenizer.from_str(read_text(path))
    except Exception as error:  # the only class that tokenizers raises
        raise TrainingError(f"{path} holds no tokenizer: {error}") from error
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Returns the id of the end of text, the last one."""
    return tokenizer.get_vocab_size() - 1

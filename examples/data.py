"""Byte-level text: files -> one memory-mapped token file per split -> packed sequences with their boundaries.

A document is one file: BOS, its bytes, EOS. The documents of a split stand one behind the other in
`<split>.bin` (uint16); the starts of the documents are `<split>.starts.npy`. Sequence i is the window [i *
context, (i + 1) * context) of that stream, and the document starts inside it are its boundaries. Which
sequences a micro-batch holds is a pure function of its number and the seed, so the position in the data needs
no state: a resumed run only needs to know its step.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BOS, EOS, PAD = 256, 257, 258
VOCAB_SIZE = 264  # 256 bytes and 3 specials, rounded up to a multiple of 8 for tensor cores
IGNORED = -100  # target that no loss counts: padding, and the first token of the next document
VALIDATION_EVERY = 20  # each 20th document is for validation
SPLITS = ("train", "val")


def encode(text: str | bytes) -> list[int]:
    """Tokens of a text that begins a document."""
    return [BOS, *(text.encode() if isinstance(text, str) else text)]


def decode(tokens: Iterable[int]) -> str:
    """Text of tokens; specials are left out, broken UTF-8 is replaced."""
    return bytes(t for t in tokens if t < 256).decode(errors="replace")


def standard_library_files() -> list[Path]:
    """The *.py files of the running Python's standard library, sorted, without installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"}
    files = (p for p in root.rglob("*.py") if not installed & set(p.relative_to(root).parts))
    return sorted(p for p in files if p.is_file())


def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """Files of text among the given files and folders (hidden and binary ones left out); none given: the
    standard library.
    """
    paths = [Path(p) for p in paths]
    if not paths:
        return standard_library_files()
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            visible = (p for p in path.rglob("*") if not _is_hidden(p.relative_to(path)))
            files += sorted(p for p in visible if p.is_file() and _is_text(p))
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"--data {path}: no such file or folder")
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def split_documents(documents: list[bytes]) -> dict[str, list[bytes]]:
    """Every 20th document is for validation; of fewer than 20 documents, the last twentieth of each is."""
    if len(documents) >= VALIDATION_EVERY:
        held_out = range(VALIDATION_EVERY - 1, len(documents), VALIDATION_EVERY)
        train = [d for i, d in enumerate(documents) if i not in held_out]
        return {"train": train, "val": [documents[i] for i in held_out]}
    cuts = [len(d) - len(d) // VALIDATION_EVERY for d in documents]
    return {
        "train": [d[:cut] for d, cut in zip(documents, cuts, strict=True)],
        "val": [d[cut:] for d, cut in zip(documents, cuts, strict=True) if cut < len(d)],
    }


def join_neighbours(documents: list[bytes], least: int) -> list[bytes]:
    """Documents of at least `least` bytes (but for the last one), each of files that follow each other."""
    joined: list[bytes] = []
    for document in documents:
        if joined and len(joined[-1]) < least:
            joined[-1] += document
        else:
            joined.append(document)
    return joined


def prepare(paths: Iterable[str | Path], cache_dir: str | Path, least: int = 0) -> Path:
    """Builds the token files of a corpus once and returns their folder, which is named after the files'
    names, sizes and times. least: see join_neighbours.

    Safe to call from several processes at once: the folder appears by one rename.
    """
    files = text_files(paths)
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    folder = Path(cache_dir) / hashlib.sha256(repr((VOCAB_SIZE, stats, least)).encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    documents = [content for content in (f.read_bytes() for f in files) if content]
    documents = join_neighbours(documents, least)
    if not documents:
        raise ValueError(f"no text in {', '.join(map(str, paths)) or 'the standard library'}")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        building = Path(scratch) / "tokens"
        building.mkdir()
        for split, members in split_documents(documents).items():
            if not members:
                raise ValueError(
                    "too little text for validation: 20 files, or 20 bytes in one, are the least"
                )
            _write_split(building / split, members)
        try:
            building.rename(folder)
        except OSError:  # another process was faster; its files are the same
            if not folder.is_dir():
                raise
    return folder


def _write_split(stem: Path, documents: list[bytes]) -> None:
    lengths = np.array([len(d) + 2 for d in documents], dtype=np.int64)
    np.save(f"{stem}.starts.npy", np.cumsum(lengths) - lengths)
    with open(f"{stem}.bin", "wb") as file:
        for document in documents:
            tokens = np.empty(len(document) + 2, dtype=np.uint16)
            tokens[0], tokens[-1] = BOS, EOS
            tokens[1:-1] = np.frombuffer(document, dtype=np.uint8)
            tokens.tofile(file)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Batch:
    """Packed sequences: T = sequences * context tokens in one row.

    tokens, targets: int64 [T]; positions: int64 [T], from 0 in each document; cu_seqlens: int32 [fixed
    length], document boundaries, its last value repeated up to a length that is the same for every batch (so
    that compiled graphs are reused); max_seqlen: the context; lengths: the documents' lengths as plain
    numbers, without the repeats.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    lengths: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; copies to a GPU go through pinned memory and do not block."""

        def move(tensor: Tensor) -> Tensor:
            tensor = tensor.pin_memory() if device.type == "cuda" else tensor
            return tensor.to(device, non_blocking=True)

        tensors = (move(t) for t in (self.tokens, self.targets, self.positions, self.cu_seqlens))
        return Batch(*tensors, self.max_seqlen, self.lengths)


class PackedText:
    """One split of a prepared corpus, as sequences of `context` tokens."""

    def __init__(self, folder: str | Path, split: str, context: int) -> None:
        self.context = context
        self.tokens = np.memmap(Path(folder) / f"{split}.bin", dtype=np.uint16, mode="r")
        self.starts = np.load(Path(folder) / f"{split}.starts.npy")
        self.num_sequences = -(-len(self.tokens) // context)
        self._order: tuple[tuple[int, int] | None, np.ndarray] = (None, np.empty(0, dtype=np.int64))
        inner = self.starts[self.starts % context != 0]  # a start on a sequence's own boundary adds none
        # Documents in the fullest sequence: the one it begins in, the inner starts, and the padding of the
        # last one.
        self.max_documents = 2 + int(np.bincount(inner // context).max(initial=0))

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [context + 1] (the last is only a target; PAD behind the stream's end) and document starts
        inside the sequence.
        """
        begin = index * self.context
        end = begin + self.context
        tokens = np.full(self.context + 1, PAD, dtype=np.int64)
        stored = self.tokens[begin : end + 1]
        tokens[: len(stored)] = stored
        first, last = np.searchsorted(self.starts, [begin + 1, end])
        starts = self.starts[first:last] - begin
        if len(stored) < self.context:  # the padding is a document of its own
            starts = np.append(starts, len(stored))
        return tokens, starts

    def batch(self, indices: Iterable[int]) -> Batch:
        """The sequences of these numbers as one packed batch."""
        sequences = [self.sequence(i) for i in indices]
        tokens = np.stack([t for t, _ in sequences])
        targets = np.where((tokens[:, 1:] == BOS) | (tokens[:, 1:] == PAD), IGNORED, tokens[:, 1:])
        total = len(sequences) * self.context
        starts = [row * self.context + np.append(0, inner) for row, (_, inner) in enumerate(sequences)]
        bounds = np.concatenate(starts)
        lengths = np.diff(bounds, append=total)
        cu_seqlens = np.full(len(sequences) * self.max_documents + 1, total, dtype=np.int32)
        cu_seqlens[: len(bounds)] = bounds
        return Batch(
            tokens=torch.from_numpy(tokens[:, :-1].reshape(-1).copy()),
            targets=torch.from_numpy(targets.reshape(-1)),
            positions=torch.from_numpy(np.arange(total) - np.repeat(bounds, lengths)),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=self.context,
            lengths=tuple(lengths.tolist()),
        )

    def micro_batch(self, number: int, size: int, seed: int) -> Batch:
        """Micro-batch `number` of an endless stream that visits all sequences in a new random order in each
        epoch.
        """
        first = number * size
        return self.batch(self._shuffled(first + j, seed) for j in range(size))

    def _shuffled(self, position: int, seed: int) -> int:
        epoch, offset = divmod(position, self.num_sequences)
        if self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng((seed, epoch)).permutation(self.num_sequences)
        return int(self._order[1][offset])

    def evenly(self, count: int, size: int) -> Iterator[Batch]:
        """About `count` sequences spread evenly over the split, in batches of `size` (for validation)."""
        count = min(count, self.num_sequences)
        count = max(count - count % size, min(count, size))  # whole batches, or a single smaller one
        chosen = np.linspace(0, self.num_sequences - 1, count).round().astype(int).tolist()
        for first in range(0, count, size):
            yield self.batch(chosen[first : first + size])

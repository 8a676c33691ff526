"""Text as a stream of documents, each in one of three splits.

`train` is trained on, `tune` chooses learning rates and draws curves, `test` is read once, for the record. A hash of a
document's name decides its split (of its text where the name only says where it stands), so that a stream can be split
as it goes by. In a corpus of few documents, each one's last lines are held out.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SPLITS = "train", "tune", "test"
MANY_DOCUMENTS = 200  # of as many, a split of 5 % gets none once in 28,000 corpora
PIECE_CHARS = 65_536  # tiktoken would overflow its stack on a million blanks in a row


@dataclass(frozen=True)
class Document:
    """`chunks()` gives its text, in strings of bounded size, each time it is called."""

    name: str
    chunks: Callable[[], Iterable[str]]
    is_named: bool = True  # False: the name only says where the document stands


@dataclass
class Part:
    """A file or a shard of a data set, which can be read without the others."""

    name: str  # in messages and in the manifest: a path, if it is a file
    read: Callable[["Part"], Iterator[Document]]
    size: int = 0  # bytes on the disk; 0: not known
    modified: int = 0  # nanoseconds
    split: str | None = None  # of all its documents; None: they are split
    has_one: bool = False  # document
    prefix: str = ""  # of its documents' names
    done: int = 0  # bytes on the disk that are read so far

    def documents(self) -> Iterator[Document]:
        self.done = 0
        return self.read(self)

    @property
    def identity(self) -> list:
        return [self.name, self.size, self.modified, self.split, self.prefix]


class Item(NamedTuple):
    """A piece of text that is encoded by itself. A document without text is an item without a split."""

    split: str | None
    document: str
    text: str
    is_first: bool  # of its document
    begins: bool  # its document, or its document's part of this split
    ends: bool


class Splitter:
    """Cuts the documents of a corpus into items and gives each its split."""

    def __init__(self, parts: Sequence[Part], held_out: float):
        given = {part.split for part in parts}
        self.shares = {split: held_out for split in SPLITS[1:] if split not in given}
        documents = itertools.chain.from_iterable(
            range(1) if part.has_one else part.documents() for part in parts if part.split is None
        )
        self.many = len(list(itertools.islice((None for _ in documents), MANY_DOCUMENTS))) == MANY_DOCUMENTS

    def items(self, part: Part) -> Iterator[Item]:
        """The text of a part, the same at each call."""
        for document in part.documents():
            is_empty = True
            for split, chunks in self.split(part, document):
                texts, begins = pieces(chunks), True
                text = next(texts, "")
                while text:
                    following = next(texts, "")
                    yield Item(split, document.name, text, is_empty, begins, not following)
                    text, begins, is_empty = following, False, False
            if is_empty:
                yield Item(None, document.name, "", True, True, True)

    def split(self, part: Part, document: Document) -> Iterator[tuple[str, Iterable[str]]]:
        """(split, text in it) for each split that the document is in."""
        if part.split or not self.shares:
            yield part.split or "train", document.chunks()
        elif self.many:
            key = [os.fsencode(document.name)] if document.is_named else map(str.encode, document.chunks())
            digest = hashlib.sha256(b"".join(key)).digest()
            yield self.split_at(int.from_bytes(digest[:8]) / 2**64), document.chunks()
        else:
            size = sum(map(len, document.chunks()))
            for split, texts in itertools.groupby(self.placed(document, size), key=lambda placed: placed[0]):
                yield split, (text for _, text in texts)

    def placed(self, document: Document, size: int) -> Iterator[tuple[str, str]]:
        """(split, text) for short pieces of the document, cut before a line end where there is one."""
        start, most = 0, int(size * min(self.shares.values()) / 5)
        for text in pieces(document.chunks(), max(1, min(PIECE_CHARS, most))):
            yield self.split_at(start / size), text
            start += len(text)

    def split_at(self, place: float) -> str:
        """The split at a place from 0 to 1: the held-out ones come last."""
        start = 1.0
        for split, share in reversed(self.shares.items()):
            start -= share
            if place >= start:
                return split
        return "train"


def pieces(chunks: Iterable[str], most: int = PIECE_CHARS) -> Iterator[str]:
    """The text of `chunks` in pieces of at most `most` characters, cut before a line end where there is one; where the
    chunks are cut makes no difference."""
    rest = ""
    for chunk in chunks:
        rest += chunk
        start = 0
        while len(rest) - start > most:
            end = rest.rfind("\n", start + 1, start + most)
            end = start + most if end < 0 else end
            yield rest[start:end]
            start = end
        rest = rest[start:]
    if rest:
        yield rest

"""Text in files: plain text, .jsonl and .parquet, each also compressed as .gz or .zst."""

import codecs
import functools
import glob
import gzip
import itertools
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar

from pydantic import AfterValidator

from train.corpus import Document, Part
from train.errors import InputError
from train.files import read_json
from train.sections import distinct
from train.sources import Place
from train.sources.text import TextSource
from train.store import PLAN

BLOCK = 2**20
ROWS = 128  # of a parquet file in memory
DEEPEST = 32  # folders in each other; Linux follows 40 links
NOT_TEXT = {  # suffixes, and what to do with such a file
    ".json": "write a document a line as .jsonl",
    ".geojson": "write a document a line as .jsonl",
    ".ipynb": "write its cells as .md or .py",
    ".csv": "write a document a line as .jsonl",
    ".tsv": "write a document a line as .jsonl",
    ".arrow": "give its data set's folder as corpus: {hf: FOLDER}",
    ".bin": "files of token ids go with corpus: {tokens: [...], tokenizer: gpt2}",
    ".npy": "files of token ids go with corpus: {tokens: [...], tokenizer: gpt2}, without numpy's header",
}
CACHED = re.compile(r"(tokens|latest)-[0-9a-f]{16}(\.lock|\.json)?")  # as train/tokens.py names what it writes
Patterns = Annotated[list[str], AfterValidator(distinct)]


class Corpus(TextSource):
    """`files`: paths or patterns, absolute or relative to the first folder of the place in which they match. `column`:
    where the text is in a line of .jsonl or a row of .parquet. `tune` and `test`: files that are these splits; what is
    left out is split off from `files`."""

    key: ClassVar[str] = "files"
    files: Patterns
    tune: Patterns | None = None
    test: Patterns | None = None
    column: str = "text"

    def parts(self, place: Place) -> list[Part]:
        """Sorted by name, the files of a given split first, so that no limit ends before them. A file with several
        names (a link, overlapping patterns) is read once, under the first."""
        found: dict[tuple[int, int], tuple[Path, os.stat_result, str | None]] = {}
        for split, patterns in (("tune", self.tune), ("test", self.test), (None, self.files)):
            paths = {path for pattern in patterns or [] for path in matches(pattern, place)}
            for path in sorted(paths):
                stat = path.stat()
                found.setdefault((stat.st_dev, stat.st_ino), (path, stat, split))
        root = os.path.commonpath([path.parent for path, *_ in found.values()])
        parts = (self.part(path, stat, split, root) for path, stat, split in found.values())
        return sorted(parts, key=lambda part: (part.split is None, part.name))

    def part(self, path: Path, stat: os.stat_result, split: str | None, root: str) -> Part:
        name, kind = path.relative_to(root).as_posix(), suffix(path)
        if kind in DECOMPRESS:
            kind = suffix(path.with_suffix(""))
        if kind in NOT_TEXT:
            raise InputError(f"corpus: {path} is no text: {NOT_TEXT[kind]}, or leave it out by other patterns")
        read = {".jsonl": read_jsonl, ".ndjson": read_jsonl, ".jsonlines": read_jsonl, ".parquet": read_parquet}.get(
            kind, read_text
        )
        reader = functools.partial(read, path, name, self.column)
        return Part(str(path), reader, stat.st_size, stat.st_mtime_ns, split, read is read_text, name)


def suffix(path: Path) -> str:
    return path.suffix.lower()


def matches(pattern: str, place: Place) -> list[Path]:
    """The files that a pattern means, without what studies have written. InputError if there are none."""
    expanded = os.path.expanduser(pattern)
    hidden = 0
    for folder in place.folders:
        # A name that exists is meant literally, whatever brackets it has in it.
        found = glob.iglob(expanded, root_dir=folder, recursive=True)
        paths = []
        for name in [expanded] if (folder / expanded).is_file() else found:
            if name.count(os.sep) > DEEPEST:
                raise InputError(f"corpus: {pattern!r} leads through links in a circle: {name[:60]}...; name files")
            if (folder / name).is_file():
                paths.append(Path(os.path.abspath(folder / name)))
        hidden += len(paths)
        paths = [path for path in paths if not any(map(CACHED.fullmatch, path.parts))]
        if paths := [path for path in paths if not is_written_by_a_study(path.parent, place.output)]:
            return paths
    if hidden:
        raise InputError(f"corpus: all {hidden} files that match {pattern!r} are in a study's output; see --out")
    places = dict.fromkeys(str(Path(folder).absolute()) for folder in place.folders)
    searched = "" if os.path.isabs(expanded) else f" in {' or '.join(places)}"
    if any(os.path.isdir(os.path.join(folder, expanded)) for folder in places):
        use = f"give a pattern for its files, such as '{pattern}/**/*.txt', or a data set's folder as corpus.hf"
        raise InputError(f"corpus: {pattern!r} is a folder; {use}")
    raise InputError(f"corpus: no file matches {pattern!r}{searched}; give files or patterns such as 'texts/**/*.txt'")


@functools.lru_cache(maxsize=2**16)
def is_written_by_a_study(folder: Path, output: Path | None) -> bool:
    """True for folders in a study's directory."""
    if output and folder == Path(os.path.abspath(output)):
        return True
    if (folder / PLAN).is_file() and {"runs", "settings"} <= read_json(folder / PLAN).keys():
        return True
    return folder != folder.parent and is_written_by_a_study(folder.parent, output)


# What is in a file


def damaged(path: Path, part: Part, error: Exception | str) -> InputError:
    problem = f"is damaged, or is not what its name says, near byte {part.done:,} of {part.size:,}"
    return InputError(f"corpus: {path} {problem} ({str(error).splitlines()[0]}); restore it or leave it out")


def blocks(path: Path, part: Part) -> Iterator[bytes]:
    """The content of a file, decompressed. InputError where it cannot be read or is damaged."""
    try:
        with path.open("rb") as file:
            for block in DECOMPRESS.get(suffix(path), _plain)(file):
                part.done = file.tell()
                yield block
    except InputError:
        raise
    except (EOFError, zlib.error, ValueError, gzip.BadGzipFile) as e:
        raise damaged(path, part, e) from None
    except OSError as e:
        raise InputError(f"corpus: cannot read {path}: {e.strerror or e}") from None


def _plain(file: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: file.read(BLOCK), b"")


def _gzip(file: BinaryIO) -> Iterator[bytes]:
    return _plain(gzip.GzipFile(fileobj=file))


def _zstd(file: BinaryIO) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise InputError(f"corpus: reading {file.name} needs zstandard: uv sync --extra data installs it") from None
    frame = None
    for block in _plain(file):
        while block:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                if content := frame.decompress(block):  # an empty block would be taken for the end
                    yield content
            except zstandard.ZstdError as e:
                raise ValueError(str(e)) from None
            block, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame:
        raise EOFError("it ends too early")


DECOMPRESS = {".gz": _gzip, ".zst": _zstd}


def read_text(path: Path, name: str, column: str, part: Part) -> Iterator[Document]:
    yield Document(name, functools.partial(decoded, path, part))


def decoded(path: Path, part: Part) -> Iterator[str]:
    """The text of a file without a byte order mark. InputError where it is not UTF-8 text."""
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0  # bytes that are decoded so far
    for block in itertools.chain(blocks(path, part), [b""]):
        before = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as e:
            problem = f"is not UTF-8 text (byte offset {offset + e.start})"
            raise InputError(f"corpus: {path} {problem}; convert or leave it out") from None
        if "\0" in text:
            place = offset + len(text[: text.index("\0")].encode())
            problem = f"is no text (a NUL at byte offset {place})"
            raise InputError(f"corpus: {path} {problem}; {NOT_TEXT['.bin']}, or leave it out by other patterns")
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += before + len(block) - len(decoder.getstate()[0])


def read_jsonl(path: Path, name: str, column: str, part: Part) -> Iterator[Document]:
    shape = f'lines are like {{"{column}": "..."}}'
    for number, line in enumerate(lines(blocks(path, part)), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:  # also where the line is not UTF-8
            problem = getattr(e, "msg", None) or getattr(e, "reason", e)
            raise InputError(f"corpus: {path}:{number} is not JSON ({problem}); {shape}") from None
        if not isinstance(record, dict):
            raise InputError(f"corpus: {path}:{number} is no object; {shape}")
        yield row_document(record, column, f"{path}:{number}", f"{name}#{number}")


def lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    rest: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield b"".join(rest)


def row_document(row: Mapping[str, Any], column: str, where: str, name: str) -> Document:
    """The document in a row's column. InputError, with `where`, if it holds anything other than text or null."""
    if column not in row:
        raise InputError(
            f"corpus: {where} has no {column!r}, but {', '.join(row) or 'nothing'}: name the one with text as column"
        )
    text = row[column]
    if text is None:
        text = ""
    if not isinstance(text, str):
        raise InputError(f"corpus: {where} has a {type(text).__name__} in {column!r}: name one with text as column")
    if not text.isascii():  # JSON can spell half a surrogate pair, UTF-8 can't: such halves become U+FFFD
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Document(name, lambda: [text], is_named=False)


def read_parquet(path: Path, name: str, column: str, part: Part) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"corpus: reading {path} needs pyarrow: uv sync --extra data installs it") from None
    next(blocks(path, part), None)  # InputError if it cannot be read
    with tempfile.TemporaryFile() as whole:  # a compressed file, as parquet is not read from its start
        if suffix(path) in DECOMPRESS:
            whole.writelines(blocks(path, part))
            whole.seek(0)
        try:
            file = parquet.ParquetFile(whole if suffix(path) in DECOMPRESS else path, pre_buffer=False)
            names, rows = file.schema_arrow.names, file.metadata.num_rows
            if column not in names:
                row_document(dict.fromkeys(names), column, str(path), name)
            row = 0
            for batch in file.iter_batches(ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    yield row_document({column: text}, column, f"{path} row {row}", f"{name}#{row}")
                    row += 1
                part.done = part.size * row // max(1, rows)
        except (ArrowException, OSError, UnicodeDecodeError) as e:
            raise damaged(path, part, e) from None

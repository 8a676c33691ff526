"""Text to train on, read the same way on every machine.

Two results may stand in one figure only if their models saw the same text, split in the same way. So documents have
names relative to the corpus's root, and a fingerprint of names, texts and split goes into every record. `stdlib` is the
source of the running Python's standard library; `environment` is the Python source and the texts of all installed
packages, some hundreds of MB.
"""

import glob
import hashlib
import io
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from train.errors import InputError

ENVIRONMENT = ".py", ".rst", ".md", ".txt"
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
MIN_DOCUMENTS = 20
VAL_SHARE = 0.05
JSONL_LINE = 'lines are like {"text": "..."}'


@dataclass(frozen=True)
class Document:
    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Document texts by split; `bytes` counts the UTF-8 bytes of all of them."""

    name: str
    train: list[str]
    val: list[str]
    bytes: int
    fingerprint: str


def load_corpus(name: str | None = None, files: Sequence[str] = (), relative_to: Sequence[Path] = ()) -> Corpus:
    """The corpus `name` ("stdlib", "environment"), or the one made of `files`; InputError says what to change.

    `files` are paths or glob patterns, absolute or relative to the first folder of `relative_to` (default: the current
    one) in which they match. A `.jsonl` has a document a line in the field "text", a `.parquet` a document a row in the
    column "text"; every other file is one document of UTF-8 text. Documents without text are left out.
    """
    files = [files] if isinstance(files, str) else list(files)
    if (name is None) == (not files):
        number = "both" if files else "neither"
        raise InputError(f"corpus: give either a name ({NAMES}) or files (a list of patterns), {number} was given")
    if name is not None and name not in NAMED:
        raise InputError(f"corpus: unknown name {name!r}; allowed are {NAMES}, or give files instead of a name")
    documents = NAMED[name]() if name else _from_files(files, list(relative_to) or [Path.cwd()])
    split = _split([document for document in documents if document.text])
    if not all(split):
        where = ", ".join(files) if files else f"no source of {name} on this machine"
        raise InputError(f"corpus: empty, there is no text to train on ({where}); give files with text in them")

    digest, size = hashlib.sha256(), 0
    for part, documents in zip(("train", "val"), split, strict=True):
        for document in documents:
            data = document.text.encode()
            digest.update(f"{part}\0{len(data)}\0".encode() + os.fsencode(document.name) + b"\0" + data)
            size += len(data)
    texts = [[document.text for document in documents] for documents in split]
    return Corpus(name or "files", *texts, size, digest.hexdigest()[:16])


def _stdlib() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, entries in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in STDLIB_LEFT_OUT and not sub.startswith("config-")]
        # _sysconfigdata is generated and full of this machine's paths.
        sources = (entry for entry in entries if entry.endswith(".py") and not entry.startswith("_sysconfigdata"))
        names += [(Path(folder) / source).relative_to(root).as_posix() for source in sources]
    documents = (Document(name, _source(root / name)) for name in sorted(names))
    yield from (document for document in documents if document.text)


def _environment() -> Iterator[Document]:
    """Files of equal content are taken once, under the first of their names."""
    roots = dict.fromkeys(Path(sysconfig.get_path(where)) for where in ("purelib", "platlib"))
    paths = {
        (Path(folder) / entry).relative_to(root).as_posix(): Path(folder) / entry
        for root in roots
        for folder, _, entries in os.walk(root)
        for entry in entries
        if entry.endswith(ENVIRONMENT)
    }
    seen = set()
    for name in sorted(paths):
        text = _source(paths[name])
        if (digest := hashlib.sha256(text.encode()).digest()) not in seen:
            seen.add(digest)
            yield Document(name, text)


NAMED = {"stdlib": _stdlib, "environment": _environment}
NAMES = " or ".join(NAMED)


def _source(path: Path) -> str:
    """A file's text, a Python file's in the encoding that it names; empty where it is no text."""
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline) if path.suffix == ".py" else ("utf-8", None)
        return data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _from_files(patterns: Sequence[str], folders: Sequence[Path]) -> Iterator[Document]:
    paths = sorted({path for pattern in patterns for path in _matches(pattern, folders)})
    root = os.path.commonpath([path.parent for path in paths])
    by_name = {path.relative_to(root).as_posix(): path for path in paths}
    for name in sorted(by_name):
        yield from _read(by_name[name], name)


def _matches(pattern: str, folders: Sequence[Path]) -> list[Path]:
    expanded = os.path.expanduser(pattern)
    for folder in folders:
        # A name that exists is meant literally, whatever brackets it has in it.
        found = [expanded] if (folder / expanded).is_file() else glob.glob(expanded, root_dir=folder, recursive=True)
        paths = [Path(os.path.abspath(folder / name)) for name in found if (folder / name).is_file()]
        if paths:
            return paths
    places = dict.fromkeys(str(Path(folder).absolute()) for folder in folders)
    searched = "" if os.path.isabs(expanded) else f" in {' or '.join(places)}"
    if any(os.path.isdir(os.path.join(folder, expanded)) for folder in places):
        raise InputError(f"corpus: {pattern!r} is a folder; give a pattern for its files, such as '{pattern}/**/*.txt'")
    raise InputError(f"corpus: no file matches {pattern!r}{searched}; give files or patterns such as 'texts/**/*.txt'")


def _read(path: Path, name: str) -> Iterator[Document]:
    try:
        if path.suffix == ".parquet":
            texts = _parquet_texts(path)
        elif path.suffix == ".jsonl":
            texts = _jsonl_texts(path)
        else:
            yield Document(name, _decode(path))
            return
        yield from (Document(f"{name}#{index}", text) for index, text in enumerate(texts))
    except OSError as error:
        raise InputError(f"corpus: cannot read {path}: {error.strerror or error}") from error


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode().removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        raise InputError(f"corpus: {path} is not UTF-8 text (byte offset {e.start}); convert or leave it out") from None


def _jsonl_texts(path: Path) -> Iterator[str]:
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for line ends.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as e:
            raise InputError(f"corpus: {path}:{number} is not JSON ({getattr(e, 'msg', e)}); {JSONL_LINE}") from None
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise InputError(f'corpus: {path}:{number} has no string "text"; {JSONL_LINE}')
        # JSON can spell half a surrogate pair, UTF-8 can't: such halves become U+FFFD.
        yield text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet_texts(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise InputError(f"corpus: reading {path} needs pyarrow: uv sync --extra data installs it") from None
    try:
        table = parquet.ParquetFile(path)
        if "text" not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise InputError(f'corpus: {path} has no column "text", but {columns}; rename the one with the text')
        texts = table.read(columns=["text"]).column("text").to_pylist()
    except ArrowException as error:
        raise InputError(f"corpus: {path} is not a parquet file ({str(error).splitlines()[0]})") from None
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"corpus: {path} row {row} has no text in its column; drop such rows")
        yield text


def _split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, validation). Holds out documents in the order of a hash of their names, until they have 5 % of the
    text, except one that has more by itself. Where too few can be held out so, the last tenth of each is."""
    enough = VAL_SHARE * sum(len(document.text) for document in documents)
    val, held_out = set(), 0
    for document in sorted(documents, key=lambda document: hashlib.sha256(os.fsencode(document.name)).digest()):
        if held_out < enough and len(document.text) <= enough:
            val.add(document.name)
            held_out += len(document.text)
    if len(documents) >= MIN_DOCUMENTS and held_out >= enough:
        return [d for d in documents if d.name not in val], [d for d in documents if d.name in val]
    cuts = [(document, _tail_start(document.text)) for document in documents]
    train = [Document(document.name, document.text[:cut]) for document, cut in cuts if cut]
    return train, [Document(document.name, document.text[cut:]) for document, cut in cuts]


def _tail_start(text: str) -> int:
    """Where the last tenth begins: after the last line end before it, unless that would hold out over a fifth."""
    cut = len(text) * 9 // 10
    line_end = text.rfind("\n", len(text) * 8 // 10, cut)
    return cut if line_end < 0 else line_end + 1

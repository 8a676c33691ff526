"""Text that every machine has: the source of the running Python's standard library, and of all installed packages."""

import functools
import io
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

from train.corpus import Document, Part
from train.sources import Place
from train.sources.text import TextSource

ENVIRONMENT = ".py", ".rst", ".md", ".txt"
STDLIB_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}


class Corpus(TextSource):
    """`stdlib`: the standard library without its tests. `environment`: source and texts of all installed packages, some
    hundreds of MB; equal files are in the same split, as their texts decide it."""

    key: ClassVar[str] = "name"
    names: ClassVar[tuple[str, ...]] = ("stdlib", "environment")
    name: Literal["stdlib", "environment"]

    def title(self) -> str:
        return self.name

    def parts(self, place: Place) -> list[Part]:
        paths = stdlib() if self.name == "stdlib" else environment()
        is_named, parts = self.name == "stdlib", []
        for name, path in sorted(paths.items()):
            stat = path.stat()
            read = functools.partial(read_source, path, name, is_named)
            parts.append(Part(str(path), read, stat.st_size, stat.st_mtime_ns, None, True, name))
        return parts


def stdlib() -> dict[str, Path]:
    """{name: path}; names are relative to the library's folder."""
    root, paths = Path(sysconfig.get_path("stdlib")), {}
    for folder, subfolders, entries in os.walk(root):
        subfolders[:] = [sub for sub in subfolders if sub not in STDLIB_LEFT_OUT and not sub.startswith("config-")]
        # _sysconfigdata is generated and full of this machine's paths.
        sources = (entry for entry in entries if entry.endswith(".py") and not entry.startswith("_sysconfigdata"))
        paths |= {(Path(folder) / source).relative_to(root).as_posix(): Path(folder) / source for source in sources}
    return paths


def environment() -> dict[str, Path]:
    roots = dict.fromkeys(Path(sysconfig.get_path(where)) for where in ("purelib", "platlib"))
    return {
        (Path(folder) / entry).relative_to(root).as_posix(): Path(folder) / entry
        for root in roots
        for folder, _, entries in os.walk(root)
        for entry in entries
        if entry.endswith(ENVIRONMENT) and (Path(folder) / entry).is_file()  # no link to nothing
    }


def read_source(path: Path, name: str, is_named: bool, part: Part) -> Iterator[Document]:
    """A file's text, a Python file's in the encoding that it names; empty where it is no text."""
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline) if path.suffix == ".py" else ("utf-8", None)
        text = data.decode(encoding)
        text.encode()
    except (SyntaxError, LookupError, UnicodeError):
        text = ""
    part.done, text = len(data), "" if "\0" in text else text
    yield Document(name, lambda: [text], is_named)

"""Data sets of Hugging Face, read by their `datasets` library: streamed from the Hub, or from a folder."""

import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from train.corpus import Document, Part
from train.errors import InputError
from train.progress import console
from train.sources import Place
from train.sources.files import row_document
from train.sources.text import TextSource


class Corpus(TextSource):
    """`hf`: a data set's name on the Hub, which is streamed, or a folder with its files or as `save_to_disk` wrote it.
    `config`, `split` and `revision` are those of `datasets.load_dataset`; `column` has the text."""

    key: ClassVar[str] = "hf"
    hf: str = Field(min_length=1)
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    column: str = "text"

    def title(self) -> str:
        return self.hf

    def folder(self, place: Place) -> Path | None:
        """Where the data set lies; None if it is on the Hub."""
        paths = (folder / os.path.expanduser(self.hf) for folder in place.folders)
        return next((path for path in paths if path.is_dir()), None)

    def identity(self, place: Place) -> list[list]:
        """The files of a folder; of the Hub's data sets nothing is asked again: give a `revision` to be sure."""
        folder = self.folder(place)
        if folder and place.output and Path(os.path.abspath(place.output)).is_relative_to(os.path.abspath(folder)):
            raise InputError(f"corpus: hf {folder} has the study's own output in it; choose another place with --out")
        files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder else []
        return [[str(path), path.stat().st_size, path.stat().st_mtime_ns, None] for path in files]

    def parts(self, place: Place) -> list[Part]:
        folder = self.folder(place)
        data = self.open(folder)
        if not hasattr(data, "num_shards"):  # it is not streamed, but memory-mapped
            data = data.to_iterable_dataset(num_shards=max(1, min(len(data), len(data.cache_files))))
        if names := data.column_names:
            if self.column not in names:
                row_document(dict.fromkeys(names), self.column, self.hf, "")
            data = data.select_columns([self.column])
        count, where = data.num_shards, f"{folder.name if folder else self.hf}/{self.split}"
        return [
            Part(f"{where} {n}/{count}", functools.partial(self.read, data.shard(count, n), f"{where}-{n}"))
            for n in range(count)
        ]

    def open(self, folder: Path | None) -> Any:
        """The library's data set. InputError says what to do where there is none."""
        try:
            import datasets
        except ImportError:
            raise InputError("corpus: hf needs the datasets library: uv sync --extra data installs it") from None
        datasets.logging.set_verbosity_error()
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it says each time that it tries again
        datasets.disable_progress_bars()
        try:
            if folder and any((folder / name).exists() for name in ("state.json", "dataset_dict.json")):
                data = datasets.load_from_disk(str(folder))
                if not isinstance(data, dict):
                    return data
                if self.split not in data:
                    raise ValueError(f"it has no split {self.split!r}, but {', '.join(data)}")
                return data[self.split]
            if not folder:
                console.print(f"looking for {self.hf} on the Hugging Face Hub", markup=False)
            name, options = str(folder or self.hf), {"split": self.split, "revision": self.revision}
            return datasets.load_dataset(name, self.config, streaming=True, **options)
        except ConnectionError as e:  # of the library, where the Hub cannot be reached
            advice = "go online, or download it elsewhere and give its folder as hf"
            raise InputError(f"corpus: hf {self.hf} is no folder here, and the Hub: {in_a_line(e)}; {advice}") from None
        except Exception as e:  # the library and its readers have many kinds of errors
            raise InputError(f"corpus: hf {self.hf} cannot be read: {in_a_line(e)}") from None

    def read(self, data: Any, name: str, part: Part) -> Iterator[Document]:
        row = 0
        try:
            for row, record in enumerate(data):
                yield row_document(record, self.column, f"{part.name}, row {row}", f"{name}#{row}")
        except InputError:
            raise
        except Exception as e:
            raise InputError(f"corpus: {part.name} cannot be read after row {row}: {in_a_line(e)}") from None


def in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

"""A small corpus for tests of whole commands."""

from pathlib import Path


def write_texts(folder: Path) -> None:
    """`texts/*.txt` in a folder: enough documents for some to be held out."""
    (folder / "texts").mkdir()
    for n in range(30):
        (folder / "texts" / f"{n}.txt").write_text(f"Document {n}. The quick brown fox jumps over a dog.\n" * 9)

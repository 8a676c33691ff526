"""Evaluation: loss, cache memory and decode speed of trained models; reads checkpoints, writes records and results."""

import re
from pathlib import Path


def measure_names() -> list[str]:
    """The names of the measures: the modules here that define `measure`. Importing them to look would take seconds."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(file.stem for file in files if re.search(r"^def measure\(", file.read_text(encoding="utf-8"), re.M))

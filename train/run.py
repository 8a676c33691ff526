"""One run: a variant with one seed and one learning rate, and what its directory says of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from archs.techniques import Technique
from train.files import read_json
from train.variants import Variant


@dataclass(frozen=True)
class Run:
    """`kind`: `compared` runs are what the study is about, and they alone are evaluated; `tuning` runs try a learning
    rate; a `retrofit` trains its `parent` further for a `technique`."""

    kind: Literal["compared", "tuning", "retrofit"]
    variant: Variant
    seed: int
    lr: float
    settings: dict  # the part of its record that is known before anything is measured
    directory: Path
    name: str  # as `kvfrontier status` shows it
    parent: "Run | None" = None
    technique: Technique | None = None

    @property
    def key(self) -> str:
        """Hash of everything that determines the trained weights."""
        return self.settings["key"]

    def record(self) -> dict:
        """record.json as it is on the disk now; {} unless a run with this key has written it."""
        record = read_json(self.directory / "record.json")
        return record if record.get("key") == self.key else {}

    def is_finished(self, record: dict) -> bool:
        """True if the run has trained to its end, or has diverged in tuning: there, that is a result, not a failure."""
        return "train" in record or (self.kind == "tuning" and record.get("diverged", False))

    def failure(self, record: dict) -> str | None:
        """A line that says why the run failed; None if it did not."""
        failed = "failed" in record and not self.is_finished(record)
        return f"{self.name} failed: {record['failed']}" if failed else None

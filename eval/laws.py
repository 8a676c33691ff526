"""Which laws of the tests a variant in a file of its own keeps (`kvfrontier check my_file.py:MyAttention`)."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from archs import find_variant
from train.errors import InputError

TESTS = Path(__file__).resolve().parent.parent / "tests"
FILES = "archs/test_laws.py", "archs/test_sampling.py"


class Law(NamedTuple):
    """`cases`: with how many option sets it was tried; `failure`: why it does not hold, in a line; empty if it does."""

    name: str
    cases: int
    failure: str


class Collected:
    """A plugin of pytest's that keeps the outcome of each test."""

    def __init__(self):
        self.outcomes: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report) -> None:
        name = report.location[2].partition("[")[0].removeprefix("test_").replace("_", " ")
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            message = " ".join((crash.message if crash else str(report.longrepr)).split())
            self.outcomes.setdefault(name, []).append(f"{report.location[2]}: {message}"[:300])
        elif report.when == "call" and report.passed:
            self.outcomes.setdefault(name, []).append("")


def laws(arch: str) -> Iterator[Law]:
    """Each law of the tests, tried with the variant's `examples`. InputError if there is no such variant, or no tests,
    which are in a checkout alone."""
    try:
        find_variant(arch)
    except ValueError as e:
        raise InputError(str(e)) from None
    if not TESTS.is_dir():
        raise InputError(
            "the laws are tests of the project, which a wheel does not have: use a checkout, with `uv run`"
        )
    try:
        import pytest
    except ImportError:
        raise InputError("the laws need pytest and hypothesis: use `uv run kvfrontier check`") from None
    collected = Collected()
    place, _, name = arch.rpartition(":")
    variant = f"{Path(place).resolve()}:{name}" if place.endswith(".py") else arch
    how = ["-q", "-n", "0", "-p", "no:cacheprovider", "--rootdir", str(TESTS.parent), "--variant", variant]
    how += ["-k", f"{name}-"]  # what is tried with each variant has its name
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main([*how, *(str(TESTS / file) for file in FILES)], plugins=[collected])
    if status not in (0, 1):
        raise InputError(f"the laws could not be tried: {' '.join(said.getvalue().split())[-400:]}")
    for name, outcomes in collected.outcomes.items():
        yield Law(name, len(outcomes), next(filter(None, outcomes), ""))

import os
import sys

import pytest

from train.machine import tune_process

tune_process()
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # processes that tests start would each compile what they import
sys.dont_write_bytecode = False
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other worker has the other core

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on CPU tensors


def pytest_addoption(parser):
    parser.addoption("--variant", help="put this variant under the laws of all variants: file.py:Class")


def pytest_configure(config):
    if variant := config.getoption("--variant"):
        os.environ["KVFRONTIER_VARIANT"] = variant  # read by helpers.py


LONGEST = "workers", "cli", "faults", "plots", "training", "wheel", "techniques", "ops", "laws", "tokens", "retrofit"


def pytest_collection_modifyitems(items):
    """The longest files first, so that no worker is left with one of them at the end."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


@pytest.fixture(autouse=True)
def seeded():
    """The same numbers whichever tests ran before in this process."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def two_figures():
    """Of those that a command draws, for tests that are about something else: all of them take long."""
    import plots

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("plots.FIGURES", {name: plots.FIGURES[name] for name in ("frontier", "recall")})
        yield


@pytest.fixture(autouse=True, scope="session")
def short_timings():
    """What is timed in tests is checked for its arithmetic; samples of the usual length would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.speed.SECONDS", 0.02)
        patch.setitem(sys.modules["eval.speed"].ROOF_BYTES, "cpu", 2**24)
        yield

import os

import pytest

from kvfrontier import let_threads_sleep

let_threads_sleep()

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels then run on CPU tensors


@pytest.fixture(autouse=True, scope="session")
def short_timings():
    """What is timed in tests is checked for its arithmetic; samples of the usual length would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.speed.SECONDS", 0.02)
        yield

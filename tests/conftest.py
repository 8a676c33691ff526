import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does, before torch is imported


@pytest.fixture(autouse=True, scope="session")
def short_timings():
    """What is timed in tests is checked for its arithmetic; samples of the usual length would take minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.speed.SECONDS", 0.02)
        yield

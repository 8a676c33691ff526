import pytest


@pytest.fixture(autouse=True, scope="session")
def short_timings():
    """Nothing is timed here, and archs is tested without an import of eval."""

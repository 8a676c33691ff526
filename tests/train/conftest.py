import pytest
from texts import byte_tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return byte_tokens(tmp_path_factory.mktemp("cache"))

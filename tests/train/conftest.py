import pytest

from train.corpus import Corpus
from train.tokens import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small corpus in bytes."""
    texts = [f"the cat number {n} sat on the mat\n" * 20 for n in range(40)]
    corpus = Corpus("files", texts[:30], texts[30:], sum(map(len, texts)), "0" * 16)
    return prepare(corpus, "bytes", None, tmp_path_factory.mktemp("cache"))

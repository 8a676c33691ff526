"""Laws of tokenizers: nothing is lost, the same text gives the same vocabulary, and a cached one is the one trained."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from texts import refusal

from train import shards
from train import tokenizer as module
from train.corpus import Document, Part, Splitter
from train.hf_tokenizer import byte_characters, train_hf
from train.sections import TokenizerConfig
from train.sources.installed import stdlib
from train.tokenizer import PATTERN, load_tokenizer, token_bytes


def load(name, vocab_size, sample, folder):
    return load_tokenizer(TokenizerConfig(name=name, vocab_size=vocab_size), folder, lambda: sample)


@pytest.fixture(scope="module")
def texts():
    """About a megabyte of source text to train on, and as much that is held out."""
    every = [path.read_text() for path in stdlib().values() if path.read_bytes().isascii()]
    return every[::12], every[1::12]


@pytest.fixture(scope="module")
def encodings(texts, tmp_path_factory):
    cache = tmp_path_factory.mktemp("tokenizers")
    return load("bpe", 512, texts[0], cache), load("bytes", None, [], cache)


@given(st.text() | st.text("ab \n'1<|é", max_size=300) | st.just("<|endoftext|>"))
def test_decoding_gives_the_text_back_and_no_text_gives_the_end_of_text(encodings, text):
    for encoding in encodings:
        ids = encoding.encode_ordinary(text)
        assert encoding.decode(ids) == text
        assert encoding.eot_token not in ids
        assert token_bytes(encoding)[ids].sum() == len(text.encode())


def test_vocabulary_has_the_size_asked_for_and_the_end_of_text_last(encodings):
    for encoding, size in zip(encodings, (512, 257), strict=True):
        assert encoding.n_vocab == size
        assert encoding.eot_token == encoding.encode_single_token("<|endoftext|>") == size - 1
        lengths = token_bytes(encoding)
        assert lengths.dtype == np.int64
        assert lengths.shape == (size,)
        assert lengths[:256].tolist() == [1] * 256
        assert lengths[-1] == 0
        assert (lengths[256:-1] > 1).all()
    text = "naïve \U0001f600\n" * 3000
    assert encodings[1].encode_ordinary(text) == list(text.encode())


def test_tiktoken_splits_and_merges_as_the_library_that_trained(texts):
    """Held-out text, so that merges meet contexts they were not counted in."""
    trained = train_hf(texts[0], 512, PATTERN)
    encoding = module._encoding("bpe", module.PATTERN, module._train(texts[0], 512))
    # The library numbers the byte values in another order: compare what the tokens spell.
    character = dict(zip(byte_characters(), (bytes([value]) for value in range(256)), strict=True))
    for text in [*texts[1], "aaaaaaa " * 9, "don't  stop\n\n\n   'LL 12345", "x" * 300, " " * 300 + "x"]:
        theirs = [b"".join(character[c] for c in token) for token in trained.encode(text).tokens]
        assert encoding.decode_tokens_bytes(encoding.encode_ordinary(text)) == theirs


def test_training_gives_the_same_ranks_with_any_number_of_threads(texts, tmp_path):
    """In processes of their own: hash seeds and thread pools are made once a process."""
    (tmp_path / "sample.txt").write_text("".join(texts[0][:20]))
    code = (
        "import hashlib, sys; from train import tokenizer as t\n"
        "print(hashlib.sha256(t._ranks_text(t._train(open(sys.argv[1]).readlines(), 2000))).hexdigest())"
    )
    command, runs = [sys.executable, "-c", code, tmp_path / "sample.txt"], set()
    for threads in "15":
        env = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": threads}
        runs.add(subprocess.run(command, env=env, capture_output=True, check=True).stdout)
    assert len(runs) == 1


def test_a_vocabulary_is_trained_once_and_then_read(texts, tmp_path, monkeypatch):
    trained = load("bpe", 300, texts[0][:10], tmp_path)
    (path,) = tmp_path.iterdir()
    monkeypatch.setattr(module, "train_hf", lambda *_: pytest.fail("trained again"))
    read = load("bpe", 300, texts[0][:10], tmp_path)
    assert read.name == trained.name
    assert read._mergeable_ranks == trained._mergeable_ranks
    with pytest.raises(pytest.fail.Exception):
        load("bpe", 301, texts[0][:10], tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(b"cut")
    message = refusal(load_tokenizer, TokenizerConfig(name="bpe", vocab_size=300), tmp_path)
    assert f"{path} is missing or damaged; delete its folder" in message


def test_a_damaged_cache_file_is_trained_again(texts, tmp_path):
    load("bpe", 300, texts[0][:5], tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    without_last = b"".join(whole.splitlines(keepends=True)[:-1])
    for damaged in (whole[:999], without_last, whole.replace(b" 270\n", b" 271\n"), b"\xff" + whole[1:]):
        path.write_bytes(damaged)
        load("bpe", 300, texts[0][:5], tmp_path)
        assert path.read_bytes() == whole


def test_the_sample_is_bounded_spread_over_all_of_the_text_and_of_training_text_alone(monkeypatch):
    def texts(*parts):
        return [Part(str(n), lambda _, text=text: iter([Document("", lambda: [text])])) for n, text in enumerate(parts)]

    monkeypatch.setattr(shards, "SAMPLE_CHARS", 10_000)
    many = [f"{index:04}" * 25 for index in range(1000)]
    parts = texts(*many)
    picked = shards.sample(parts, Splitter(parts, 1e-9))
    assert picked == [text for text in many if text in picked]
    assert 5_000 < sum(map(len, picked)) <= 10_000
    assert int(picked[-1][:4]) > 980
    monkeypatch.setattr(shards, "SAMPLE_CHARS", 300_000)
    one = texts("".join(f"{index}\n" for index in range(100_000)))
    lines = [int(piece.split()[0]) for piece in shards.sample(one, Splitter(one, 0.05))]
    assert 60_000 < max(lines) < 90_000
    monkeypatch.setattr(shards, "SAMPLE_PARTS", 10)
    assert len(shards.sample(parts, Splitter(parts, 1e-9))) == 10
    monkeypatch.setattr(shards, "SAMPLE_READ", 50)
    assert len(shards.sample(one, Splitter(one, 0.05))) == 1


@pytest.mark.parametrize("run", " a\n-é1")
def test_no_run_is_split_off_whole_however_long_it_is(run):
    """The library's training takes the square of a piece's length: minutes for a rule of 65,536 dashes."""
    split = train_hf(["text"], 258, PATTERN).pre_tokenizer.pre_tokenize_str(run * 10_000 + "x")
    assert max(end - start for _, (start, end) in split) <= 65


def test_named_encodings_that_cannot_be_downloaded_say_so(monkeypatch, tmp_path):
    def no_network(name):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    for name in ("gpt2", "cl100k_base", "o200k_base"):
        message = refusal(load, name, None, [], tmp_path)
        assert all(word in message for word in (name, "TIKTOKEN_CACHE_DIR", "bpe or bytes"))


def test_mistakes_are_one_line_that_says_what_is_allowed(tmp_path):
    for name, size, message in (
        ("llama", None, "bpe, bytes, gpt2, cl100k_base, o200k_base"),
        ("gpt2", 1024, "only goes with bpe"),
        ("bpe", None, "at least 258"),
        ("bpe", 257, "at least 258"),
    ):
        assert message in refusal(load, name, size, ["text"], tmp_path)


def test_too_little_text_names_the_vocabulary_that_it_could_give(tmp_path):
    text = ["low lower lowest " * 3]
    message = refusal(load, "bpe", 1024, text, tmp_path)
    largest = int(message.split("at most ")[1].split()[0])
    assert load("bpe", largest, text, tmp_path).n_vocab == largest
    for more in (largest + 1, 2**31 - 1):  # so many that room for them would end the process
        assert f"at most {largest}" in refusal(load, "bpe", more, text, tmp_path)

"""Laws of token files: they decode to the corpus, are written once, and survive damage and company."""

import json
import multiprocessing
import re
from pathlib import Path

import numpy as np
import pytest
from texts import refusal
from tiktoken_ext.openai_public import r50k_pat_str

from train import tokens as module
from train.corpus import Corpus
from train.tokenizer import PATTERN, _encoding
from train.tokens import default_cache_dir, prepare


def corpus_of(train, val, fingerprint="f"):
    return Corpus("files", train, val, sum(len(text.encode()) for text in train + val), fingerprint)


@pytest.fixture
def corpus():
    train = [f"def f{i}(x):\n    return x + {i}  # é\n" * 20 for i in range(50)]
    return corpus_of(train, ["print(f1(2))\n" * 30, "", "<|endoftext|> is text here\n"])


def documents(ids, tokenizer):
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    parts = np.split(ids[ids != tokenizer.eot_token], ends - np.arange(len(ends)))
    return [tokenizer.decode(part.tolist()) for part in parts]


@pytest.mark.parametrize(("name", "size"), [("bytes", None), ("bpe", 300)])
def test_token_files_decode_to_the_documents_each_with_its_end(corpus, tmp_path, name, size):
    tokens = prepare(corpus, name, size, tmp_path)
    assert documents(tokens.train, tokens.tokenizer) == [*corpus.train, ""]
    assert documents(tokens.val, tokens.tokenizer) == [*corpus.val, ""]
    assert tokens.train[-1] == tokens.val[-1] == tokens.tokenizer.eot_token
    assert tokens.token_bytes[tokens.train].sum() + tokens.token_bytes[tokens.val].sum() == corpus.bytes
    assert tokens.n_vocab == (size or 257)
    encoding, end = tokens.tokenizer.encode_ordinary, tokens.tokenizer.eot_token
    assert tokens.train.tolist() == [id for text in corpus.train for id in [*encoding(text), end]]
    assert tokens.train.dtype == np.uint16


def test_facts_are_what_results_json_wants(corpus, tmp_path):
    facts = prepare(corpus, "bytes", None, tmp_path).facts
    assert json.loads(json.dumps(facts)) == facts
    assert facts.pop("train_tokens") + facts.pop("val_tokens") == corpus.bytes + len(corpus.train) + len(corpus.val)
    assert facts.pop("bytes_per_token") < 1
    assert facts == {"name": "files", "fingerprint": "f", "bytes": corpus.bytes}


def test_a_large_vocabulary_gets_wide_ids(corpus, tmp_path, monkeypatch):
    letters = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: _encoding("pairs", r"[\s\S]{1,2}", letters))
    tokens = prepare(corpus, "pairs", None, tmp_path)
    assert tokens.train.dtype == np.uint32
    assert documents(tokens.val, tokens.tokenizer) == [*corpus.val, ""]


def test_the_second_call_reads_and_the_arrays_are_read_only(corpus, tmp_path, monkeypatch):
    first = prepare(corpus, "bpe", 300, tmp_path)
    monkeypatch.setattr(module, "_encoded", lambda *_: pytest.fail("encoded again"))
    second = prepare(corpus, "bpe", 300, tmp_path)
    assert isinstance(second.train, np.memmap)
    assert (first.train == second.train).all()
    assert (first.val == second.val).all()
    with pytest.raises(ValueError, match="read-only"):
        second.train[0] = 0


def test_another_corpus_or_tokenizer_has_files_of_its_own(corpus, tmp_path):
    prepare(corpus, "bytes", None, tmp_path)
    prepare(corpus, "bpe", 300, tmp_path)
    other = prepare(corpus_of(["other text\n"], ["val\n"], "g"), "bytes", None, tmp_path)
    assert documents(other.train, other.tokenizer) == ["other text\n", ""]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 3


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "meta.json"])
def test_damaged_files_are_made_again(corpus, tmp_path, name):
    before = prepare(corpus, "bytes", None, tmp_path).train.tolist()
    (path,) = tmp_path.glob(f"*/{name}")
    damages = (lambda: path.write_bytes(path.read_bytes()[:-1])), path.unlink, (lambda: path.write_bytes(b"[]"))
    for damage in damages:
        damage()
        assert prepare(corpus, "bytes", None, tmp_path).train.tolist() == before
        assert [entry.name for entry in tmp_path.iterdir()] == [path.parent.name]


def test_an_interrupted_preparation_leaves_nothing_behind(corpus, tmp_path, monkeypatch):
    def interrupted(texts, *_):
        yield b"some"
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encoded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, "bytes", None, tmp_path)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    assert len(prepare(corpus, "bytes", None, tmp_path).train)


def _prepare_at(corpus, folders, barrier, answers):
    for folder in folders:
        barrier.wait()
        tokens = prepare(corpus, "bpe", 300, folder)
        answers.put((tokens.tokenizer.name, tokens.train.tobytes(), tokens.val.tobytes()))


def test_processes_that_prepare_at_once_all_end_up_right(corpus, tmp_path):
    """From nothing, and where files are damaged."""
    new, damaged = folders = tmp_path / "new", tmp_path / "damaged"
    alone, _ = (prepare(corpus, "bpe", 300, folder) for folder in (tmp_path / "alone", damaged))
    for path in damaged.glob("*/*.bin"):
        path.write_bytes(b"cut")
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_prepare_at, args=(corpus, folders, barrier, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    results = {answers.get(timeout=60) for _ in processes for _ in folders}
    for process in processes:
        process.join()
    assert results == {(alone.tokenizer.name, alone.train.tobytes(), alone.val.tobytes())}
    assert [len(list(folder.iterdir())) for folder in (new, damaged)] == [2, 2]


@pytest.mark.parametrize("run", [" ", "a", "\n", " \n", "é", "-"])
@pytest.mark.parametrize("pattern", [PATTERN, r50k_pat_str])
def test_a_million_of_one_character_is_encoded_in_seconds_and_unchanged(tmp_path, monkeypatch, pattern, run):
    """With gpt2's pattern, tiktoken overflows its stack on a million blanks."""
    encoding = _encoding("any", pattern, [bytes([value]) for value in range(256)] + [run.encode() * 2])
    monkeypatch.setattr(module, "load_tokenizer", lambda *_: encoding)
    text = run * (1_000_000 // len(run)) + "x"
    tokens = prepare(corpus_of(["text"], [text]), "any", None, tmp_path)
    assert documents(tokens.val, tokens.tokenizer) == [text, ""]


def test_a_corpus_without_one_of_its_splits_is_refused(tmp_path):
    for documents in ((["text"], []), ([], ["text"])):
        assert "no documents" in refusal(prepare, corpus_of(*documents), "bytes", None, tmp_path)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVFRONTIER_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "kvfrontier"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "kvfrontier"


def test_a_cache_folder_that_cannot_be_made_is_one_clear_line(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    message = refusal(prepare, corpus, "bytes", None, tmp_path / "file" / "cache")
    assert re.search("cannot make the cache folder .* set KVFRONTIER_CACHE", message)

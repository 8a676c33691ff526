"""Laws of tokenised corpora: they decode to the documents, are written once, and survive kills, damage and company."""

import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from texts import refusal
from tiktoken_ext.openai_public import r50k_pat_str

from train import corpus, shards
from train import tokens as module
from train.plan import Plan
from train.sections import TokenizerConfig
from train.sources import Place, files, parse
from train.study import load_data, parse_study
from train.tokenizer import PATTERN, _encoding
from train.tokens import Tokens, default_cache_dir

TRAIN = [f"def f{n}(x):\n    return x + {n}  # \xe9\n" * (1 + n % 20) for n in range(50)]
TEXTS = {"train": TRAIN, "tune": ["print(f1(2))\n" * 30, ""], "test": ["<|endoftext|> is text here\n"]}
COUNTED = "train", "tune", "val"  # what results call the splits
BYTES, BPE = {"name": "bytes"}, {"name": "bpe", "vocab_size": 300}


def write(folder, **texts):
    """A file of JSON lines for each split."""
    for split, documents in texts.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "SHARD_BYTES", 4000)
    return write(tmp_path, **TEXTS)


def load(folder, tokenizer=BYTES, **section):
    section = section or {"files": ["train.jsonl"], "tune": ["tune.jsonl"], "test": ["test.jsonl"]}
    return parse(section).load(TokenizerConfig(**tokenizer), Place([folder]))


def documents(ids, tokenizer):
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    assert len(ids) == 0 or ids[-1] == tokenizer.eot_token
    parts = np.split(ids[ids != tokenizer.eot_token], ends - np.arange(len(ends)))
    return [tokenizer.decode(part.tolist()) for part in parts[:-1]]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(sizes=st.lists(st.integers(0, 5), min_size=1), places=st.slices(20))
def test_tokens_are_one_array(sizes, places):
    whole = np.arange(sum(sizes))
    tokens = Tokens(np.split(whole, np.cumsum(sizes)[:-1]))
    places = slice(places.start, places.stop)
    assert len(tokens) == len(whole)
    assert tokens[places].tolist() == whole[places].tolist()


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_tokens_decode_to_the_documents_each_with_its_end(folder, tokenizer):
    tokens = load(folder, tokenizer)
    encoding = tokens.tokenizer
    assert len(tokens.train.arrays) > 4
    for split, texts in TEXTS.items():
        ids = getattr(tokens, split)[:]
        assert documents(ids, encoding) == list(filter(None, texts))
        assert ids.tolist() == [
            n for text in texts if text for n in [*encoding.encode_ordinary(text), tokens.end_of_text]
        ]
        assert ids.dtype == np.uint16
    assert tokens.n_vocab == tokenizer.get("vocab_size", 257)
    facts = json.loads(json.dumps(tokens.facts))
    assert facts == tokens.facts
    counts = [facts.pop(f"{name}_tokens") for name in COUNTED]
    assert counts == [len(getattr(tokens, split)) for split in TEXTS]
    size = sum(len(text.encode()) for texts in TEXTS.values() for text in texts)
    assert facts.pop("bytes_per_token") == size / sum(counts)
    assert facts == {"name": "files", "fingerprint": facts["fingerprint"], "bytes": size, "documents_without_text": 1}


def test_a_large_vocabulary_gets_wide_ids(folder, monkeypatch):
    letters = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    for each in (module, shards):
        monkeypatch.setattr(each, "load_tokenizer", lambda *_: _encoding("pairs", r"[\s\S]{1,2}", letters))
    tokens = load(folder)
    assert tokens.train[:].dtype == np.uint32
    assert documents(tokens.train[:], tokens.tokenizer) == TRAIN


# The fingerprint


@pytest.mark.parametrize("change", ["text", "empty", "split", "border", "name"])
def test_the_fingerprint_tells_any_change(folder, change):
    """Also where the tokens are the same: what a result is compared by is the text and its splits."""
    before = load(folder).facts["fingerprint"]
    texts = {split: list(texts) for split, texts in TEXTS.items()}
    if change == "text":
        texts["tune"][0] += "."
    elif change == "empty":
        texts["train"].insert(3, "")
    elif change == "split":
        texts["tune"], texts["test"] = texts["test"], texts["tune"]
    elif change == "border":
        texts["train"][:2] = [TRAIN[0] + TRAIN[1][:9], TRAIN[1][9:]]
    write(folder, **texts)
    if change == "name":
        (folder / "train.jsonl").rename(folder / "train.ndjson")
    assert load(folder, files=["tr*"], tune=["tu*"], test=["te*"]).facts["fingerprint"] != before


def test_the_fingerprint_does_not_depend_on_place_or_time(folder, monkeypatch):
    before = load(folder)
    shutil.copytree(folder, folder / "copy", ignore=shutil.ignore_patterns("cache"))
    after = load(folder / "copy")
    assert (before.facts, before.train[:].tobytes()) == (after.facts, after.train[:].tobytes())
    assert before.folder != after.folder


def test_reading_ends_with_the_document_that_reaches_the_limit(folder, monkeypatch):
    """However large shards are; also where documents are split by lines."""
    held_out = sum(len(text.encode()) for split in ("tune", "test") for text in TEXTS[split])
    read = np.cumsum([len(text.encode()) for text in TRAIN])  # up to the end of each document
    for key, counts in (("limit_bytes", held_out + read), ("limit_tokens", read + np.arange(1, len(read) + 1))):
        for limit in (1, int(counts[5]), int(counts[5]) + 1, int(counts[-1]) + 1):
            reached = key == "limit_bytes" and limit <= held_out  # before any text to train on
            expected = [] if reached else TRAIN[: int(np.searchsorted(counts, limit)) + 1]
            for size in (1, 4000):
                monkeypatch.setattr(shards, "SHARD_BYTES", size)
                shutil.rmtree(folder / "cache", ignore_errors=True)
                tokens = load(folder, files=["t*.jsonl"], tune=["tune.jsonl"], test=["test.jsonl"], **{key: limit})
                assert documents(tokens.train[:], tokens.tokenizer) == expected
    text = "".join(f"line {n}\n" for n in range(1000))
    write(folder, many=[text] * 9)
    tokens = load(folder, files=["many.jsonl"], limit_bytes=len(text) + 1)
    assert sum(tokens.facts[f"{name}_tokens"] for name in COUNTED) == 2 * (len(text) + 3)


# Once, and again


def test_the_second_start_reads_no_text_and_a_worker_needs_the_folder_alone(folder, monkeypatch, tmp_path):
    study = parse_study({"corpus": {"files": ["*.jsonl"]}, "tokenizer": BPE})
    first = load_data(study, folder / "study.yaml", folder / "out")
    assert isinstance(first.train.arrays[1], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        first.train.arrays[1][0] = 0
    monkeypatch.setattr(files, "blocks", lambda *_: pytest.fail("read again"))
    second = load_data(study, folder / "study.yaml", folder / "out")
    for path in folder.glob("*.jsonl"):
        path.unlink()
    worker = load_data(study, folder / "study.yaml", folder / "out", str(first.folder))
    for again in (second, worker):
        assert again.facts == first.facts
        assert again.tokenizer.name == first.tokenizer.name
        assert all((getattr(again, split)[:] == getattr(first, split)[:]).all() for split in corpus.SPLITS)


def test_a_changed_file_is_named(folder, capsys):
    load(folder)
    assert capsys.readouterr().err == ""
    load(folder, BPE)
    assert capsys.readouterr().err == ""  # nothing has changed but the tokenizer
    write(folder, tune=["another text\n"])
    changed = load(folder)
    assert capsys.readouterr().err == f"corpus: {folder}/tune.jsonl: changed; the text from there on is read again\n"
    assert documents(changed.tune[:], changed.tokenizer) == ["another text\n"]
    every = {"files": ["t*.jsonl"]}
    load(folder, **every)
    (folder / "test.jsonl").rename(folder / "third.jsonl")
    load(folder, **every)
    assert f"{folder}/third.jsonl: new; {folder}/test.jsonl: gone; the text" in capsys.readouterr().err


def killed_at(step, folder):
    """True if a process that loads the corpus lives no longer than to its n-th write to the disk."""
    if (child := os.fork()) == 0:
        calls = iter(range(step))

        def fsync(_):
            if next(calls, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are in the parent
        try:
            load(folder, BPE)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(folder, monkeypatch):
    """Before and after each file has its name; and again and again, further each time."""
    whole, cache = load(folder, BPE), folder / "cache"
    expected, encode, numbers = content(whole.folder), shards.encoded, []
    monkeypatch.setattr(shards, "encoded", lambda items, e: encode((numbers.append(i) or i for i in items), e))
    shutil.rmtree(cache)
    step = 0
    while killed_at(step, folder):
        done = len(list(cache.glob("tokens-*/0*.json")))  # shards, each of at least an item
        numbers.clear()
        load(folder, BPE)
        assert content(whole.folder) == expected
        assert len(numbers) <= len(TRAIN) + 3 - done
        shutil.rmtree(cache)
        step += 1
    assert step > 2 * len(expected)
    shutil.rmtree(cache)
    times = 0
    while killed_at(7, folder):
        times += 1
    assert 1 < times < step
    assert content(whole.folder) == expected


@pytest.mark.parametrize("name", ["00000.bin", "00003.bin", "manifest.json", "0*.json", "*"])
def test_damaged_files_are_made_again(folder, name):
    tokens = load(folder, BPE)
    expected = content(tokens.folder)
    for damage in (
        lambda path: path.write_bytes(path.read_bytes()[:-2]),
        Path.unlink,
        lambda path: path.write_bytes(b"[]"),
    ):
        for path in [*tokens.folder.glob(name), tokens.folder / "manifest.json"]:
            if path.exists():
                damage(path)
        load(folder, BPE)
        assert content(tokens.folder) == expected


def test_a_mistake_in_the_text_keeps_the_shards_before_it(folder, monkeypatch):
    monkeypatch.setattr(corpus, "MANY_DOCUMENTS", 9)
    monkeypatch.setattr(shards, "GROUP_ITEMS", 1)
    monkeypatch.setattr(shards, "cores", lambda: 1)
    with (folder / "train.jsonl").open("a") as file:
        file.write("{")
    section = {"files": ["train.jsonl"], "test": ["test.jsonl"], "tune": ["test.jsonl"]}
    for _ in range(2):
        assert f"train.jsonl:{len(TRAIN) + 1} is not JSON" in refusal(load, folder, **section)
        assert len(list(folder.glob("cache/tokens-*/*.bin"))) >= 3
    (folder / "none.txt").touch()
    assert "corpus: empty, there is no text to train on" in refusal(load, folder, files=["none.txt"])


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_after_a_correction_the_shards_before_it_are_used_again(folder, monkeypatch, tokenizer):
    """Equal to a pass that never saw the mistake. With another vocabulary, all is encoded again."""
    monkeypatch.setattr(corpus, "MANY_DOCUMENTS", 9)
    monkeypatch.setattr(shards, "GROUP_ITEMS", 1)
    monkeypatch.setattr(shards, "cores", lambda: 1)
    encode, numbers = shards.encoded, []
    monkeypatch.setattr(shards, "encoded", lambda items, e: encode((numbers.append(i) or i for i in items), e))
    for name, texts in (("a", TRAIN), ("b", TRAIN[::-1]), ("c", TRAIN[:9])):
        write(folder, **{name: texts})
    good = (folder / "b.jsonl").read_bytes()
    (folder / "b.jsonl").write_bytes(good[: len(good) // 2] + b"\n" + good[len(good) // 2 :])
    every = {"files": ["[abc].jsonl"]}
    assert "b.jsonl:" in refusal(load, folder, tokenizer, **every)
    (folder / "b.jsonl").write_bytes(good)
    numbers.clear()
    corrected = load(folder, tokenizer, **every)
    kept = content(corrected.folder)
    assert tokenizer == BPE or len(numbers) < 2 * len(TRAIN)
    shutil.rmtree(folder / "cache")
    fresh = load(folder, tokenizer, **every)
    assert (fresh.folder, content(fresh.folder)) == (corrected.folder, kept)


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_shards_are_not_used_again_where_names_have_changed(folder, monkeypatch, kind):
    """Names are relative to the folder that all files are in."""
    monkeypatch.setattr(corpus, "MANY_DOCUMENTS", 9)
    (folder / "t" / "a").mkdir(parents=True)
    for n, text in enumerate(TRAIN):
        (folder / "t" / "a" / f"{n}.{kind}").write_text(text if kind == "txt" else json.dumps({"text": text}))
    every = {"files": [f"t/**/*.{kind}"]}
    load(folder, **every)
    (folder / "t" / "z").mkdir()
    (folder / "t" / "z" / f"new.{kind}").write_text("new\n" if kind == "txt" else '{"text": "new"}')
    after = load(folder, **every)
    kept = content(after.folder)
    shutil.rmtree(folder / "cache")
    assert content(load(folder, **every).folder) == kept


def test_a_mistake_that_the_vocabulary_meets_keeps_the_shards_of_the_last_pass(folder, monkeypatch):
    for name in "abc":
        write(folder, **{name: TRAIN})
    every = {"files": ["[abc].jsonl"]}
    load(folder, **every)
    good = (folder / "c.jsonl").read_bytes()
    (folder / "c.jsonl").write_bytes(b"{" + good)
    assert "c.jsonl:1 is not JSON" in refusal(load, folder, **every)
    (folder / "c.jsonl").write_bytes(good)
    saved, save = [], shards.Shard.save
    monkeypatch.setattr(shards.Shard, "save", lambda *a: saved.append(a) or save(*a))
    whole = content(load(folder, **every).folder)
    assert len(saved) < sum(name.endswith(".bin") for name in whole) / 2


def test_a_run_knows_its_vocabulary(folder):
    """A vocabulary is trained on text beyond a limit, too, of which the fingerprint knows nothing."""
    section, runs, small = {"files": ["[ab].jsonl"], "limit_bytes": 300}, [], BPE | {"vocab_size": 262}
    study = {"corpus": section, "tokenizer": small, "model": {"width": 32, "layers": 2, "heads": 2, "context": 8}}
    study |= {"variants": [{"arch": "mha"}], "train": {"tokens": 64, "batch_tokens": 64}}
    write(folder, a=["x = y\n" * 99])
    for text in (" beyond the limit" * 99, "other text there " * 99):
        write(folder, b=[text])
        data = load(folder, small, **section)
        runs.append(Plan(parse_study(study), data, folder / "runs").look().runs[0])
    assert len({run.settings["corpus_fingerprint"] for run in runs}) == 1
    assert runs[0].key != runs[1].key


def _load_at(folder, caches, barrier, answers):
    shards.SHARD_BYTES = 4000
    for cache in caches:
        os.environ["KVFRONTIER_CACHE"] = str(cache)
        barrier.wait()
        tokens = load(folder, BPE)
        answers.put((tokens.tokenizer.name, *(getattr(tokens, split)[:].tobytes() for split in corpus.SPLITS)))


def test_processes_that_start_at_once_all_end_up_right(folder, monkeypatch):
    """From nothing, and where files are damaged."""
    alone = load(folder, BPE)
    for path in alone.folder.glob("*.bin"):
        path.write_bytes(b"cut")
    context, caches = multiprocessing.get_context("spawn"), (folder / "new", folder / "cache")
    barrier, answers = context.Barrier(3), context.Queue()
    processes = [context.Process(target=_load_at, args=(folder, caches, barrier, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    results = {answers.get(timeout=60) for _ in processes for _ in caches}
    for process in processes:
        process.join()
    alone = load(folder, BPE)
    assert results == {(alone.tokenizer.name, *(getattr(alone, split)[:].tobytes() for split in corpus.SPLITS))}
    assert content(folder / "new" / alone.folder.name) == content(alone.folder)


@pytest.mark.parametrize("run", [" ", "a", "\n", " \n", "é", "-"])
@pytest.mark.parametrize("pattern", [PATTERN, r50k_pat_str])
def test_a_million_of_one_character_is_encoded_in_seconds_and_unchanged(folder, monkeypatch, pattern, run):
    """With gpt2's pattern, tiktoken overflows its stack on a million blanks."""
    encoding = _encoding("any", pattern, [bytes([value]) for value in range(256)] + [run.encode() * 2])
    for each in (module, shards):
        monkeypatch.setattr(each, "load_tokenizer", lambda *_: encoding)
    text = run * (1_000_000 // len(run)) + "x"
    write(folder, test=[text])
    assert documents((tokens := load(folder)).test[:], tokens.tokenizer) == [text]


def test_a_split_that_is_shorter_than_a_sequence_is_refused(folder):
    message = refusal(load(folder).check, 30)
    assert "28 tokens in the split 'test', too few for one sequence of model.context=30" in message
    load(folder).check(27)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("KVFRONTIER_CACHE")
    assert default_cache_dir() == tmp_path / "xdg" / "kvfrontier"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "kvfrontier"


def test_a_cache_folder_that_cannot_be_made_is_one_clear_line(folder, monkeypatch):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(folder / "train.jsonl" / "cache"))
    assert re.search("cannot make the cache folder .* set KVFRONTIER_CACHE", refusal(load, folder))

"""Sources besides files: data sets through the real library, and tokens made elsewhere; and how a source is chosen."""

import datasets
import numpy as np
import pytest
from texts import refusal
from tiktoken import Encoding

from train import tokens as module
from train.corpus import SPLITS
from train.sections import TokenizerConfig
from train.sources import Place, parse, token_files
from train.study import parse_study

ROWS = {"id": list(range(300)), "text": [f"document {n} of 300 d\xe9j\xe0\n" for n in range(300)]}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))


def load(folder, section, tokenizer="bytes"):
    return parse(section).load(TokenizerConfig(name=tokenizer), Place([folder]))


def documents(tokens):
    """All of them, in any order."""
    texts = (tokens.tokenizer.decode(getattr(tokens, split)[:].tolist()) for split in SPLITS)
    return sorted("".join(texts).split("<|endoftext|>")[:-1])


# Data sets


def saved(folder):
    datasets.Dataset.from_dict(ROWS).save_to_disk(folder / "data", num_shards=3)


def saved_with_splits(folder):
    part = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"train": part, "validation": part.select(range(9))}).save_to_disk(folder / "data")


def repository(folder):
    for n in range(3):
        (folder / "data" / "data").mkdir(parents=True, exist_ok=True)
        part = datasets.Dataset.from_dict({key: values[n::3] for key, values in ROWS.items()})
        part.to_parquet(folder / "data" / "data" / f"train-{n:05}-of-00003.parquet")


@pytest.mark.parametrize("make", [saved, saved_with_splits, repository])
def test_a_data_set_on_the_disk_is_read_by_the_library(tmp_path, make):
    make(tmp_path)
    tokens = load(tmp_path, {"hf": "data"})
    assert documents(tokens) == sorted(ROWS["text"])
    assert all(2 < getattr(tokens, f"{split}")[:].tolist().count(256) < 40 for split in SPLITS[1:])
    assert tokens.facts["name"] == "data"
    assert "has no 'body', but id, text: name the one with text" in refusal(
        load, tmp_path, {"hf": "data", "column": "body"}
    )
    assert "a int in 'id'" in refusal(load, tmp_path, {"hf": "data", "column": "id"})
    if make is not saved:  # which has no splits
        message = refusal(load, tmp_path, {"hf": "data", "split": "tset"})
        assert "tset" in message
        assert "train" in message


def test_a_folder_that_is_damaged_or_no_data_set_is_one_line(tmp_path):
    repository(tmp_path)
    path = tmp_path / "data" / "data" / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[:-99])
    assert "corpus: data/train 1/3 cannot be read after row 0: Arrow" in refusal(load, tmp_path, {"hf": "data"})
    (tmp_path / "empty").mkdir()
    assert "corpus: hf empty cannot be read: " in refusal(load, tmp_path, {"hf": "empty"})


def test_a_streamed_data_set_is_read_once_by_shards(tmp_path, monkeypatch):
    asked, read = [], []

    def rows(shards):
        for shard in shards:
            read.append(shard)
            for text in ROWS["text"][shard::3]:
                yield {"text": text, "id": shard}

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    section = {"hf": "some/where", "config": "sample", "split": "all", "revision": "v1"}
    tokens = load(tmp_path, section)
    assert documents(tokens) == sorted(ROWS["text"])
    assert asked == [(("some/where", "sample"), {"split": "all", "revision": "v1", "streaming": True})]
    read.clear()
    assert documents(load(tmp_path, section)) == documents(tokens)
    assert read == []
    limited = load(tmp_path, section | {"limit_bytes": 1})
    assert limited.facts["bytes"] == len(ROWS["text"][0].encode())
    assert "row 0 has a int in 'id'" in refusal(load, tmp_path, section | {"column": "id"})


def test_without_a_network_one_line_says_what_to_do(tmp_path, monkeypatch):
    def load_dataset(*names, **options):
        raise ConnectionError("Couldn't reach 'some/where' on the Hub\n(offline)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal(load, tmp_path, {"hf": "some/where"})
    assert "hf some/where is no folder here, and the Hub: ConnectionError: Couldn't reach" in message
    assert "go online, or download it elsewhere and give its folder as hf" in message


# Files of tokens


def header(ids, magic=20240520, count=None):
    return np.array([magic, 1, len(ids) if count is None else count] + 253 * [0], np.int32).tobytes() + ids.tobytes()


def ids(count, start=0, dtype=np.uint16):
    return ((np.arange(count) * 7 + start) % 257).astype(dtype)


TRAIN, VAL, TEST = ids(5000), ids(2001, 1), ids(999, 2)
TOKENS = {"tokens": ["*.bin"], "tokenizer": "bytes"}


def write(folder, **contents):
    for path in folder.glob("*.bin"):
        path.unlink()
    for name, content in contents.items():
        (folder / f"{name}.bin").write_bytes(content if isinstance(content, bytes) else content.tobytes())
    return folder


@pytest.mark.parametrize("form", [np.ndarray.tobytes, header])
def test_tokens_made_elsewhere_are_used_where_they_lie(tmp_path, form, monkeypatch):
    """nanoGPT's raw files and llm.c's header; of one held-out file the halves are `tune` and `test`."""
    write(tmp_path, x_train_0=form(TRAIN[:3000]), x_train_1=form(TRAIN[3000:]), x_val=form(VAL), train_none=b"")
    tokens = load(tmp_path, TOKENS)
    assert [getattr(tokens, split)[:].tolist() for split in SPLITS] == [
        part.tolist() for part in (TRAIN, VAL[:1000], VAL[1000:])
    ]
    assert tokens.facts["bytes"] == (TRAIN != 256).sum() + (VAL != 256).sum()
    assert not list(tokens.folder.glob("*.bin"))
    monkeypatch.setattr(token_files, "checked", lambda *_: pytest.fail("read again"))
    assert load(tmp_path, TOKENS).facts == tokens.facts
    monkeypatch.undo()
    monkeypatch.setenv("KVFRONTIER_CACHE", str(tmp_path / "cache"))
    limited = load(tmp_path, TOKENS | {"limit_tokens": 3100})
    assert (limited.train[:] == TRAIN[:3100]).all()
    assert limited.facts["fingerprint"] != tokens.facts["fingerprint"]
    write(tmp_path, train=form(TRAIN), val=form(VAL), test=form(TEST))
    three = load(tmp_path, TOKENS)
    assert [getattr(three, split)[:].tolist() for split in SPLITS] == [TRAIN.tolist(), VAL.tolist(), TEST.tolist()]


def test_a_large_vocabulary_has_wide_ids(tmp_path, monkeypatch):
    letters = [bytes([a]) for a in range(256)] + [bytes([a, b]) for a in range(256) for b in range(256)]
    ranks = {"mergeable_ranks": {token: n for n, token in enumerate(letters)}}
    encoding = Encoding("pairs", pat_str=".", **ranks, special_tokens={"<|endoftext|>": len(letters)})
    for each in (module, token_files):
        monkeypatch.setattr(each, "load_tokenizer", lambda *_: encoding)
    wide = ids(3000, dtype=np.uint32) + np.uint32(60_000)
    write(tmp_path, train=header(wide, 20240801), val=wide)
    assert (load(tmp_path, TOKENS).train[:] == wide).all()
    write(tmp_path, train=header(TRAIN), val=wide)
    assert "train.bin has uint16 by its magic number, the vocabulary needs uint32" in refusal(load, tmp_path, TOKENS)


def beyond(at):
    values = TRAIN.copy()
    values[at] = 257
    return values


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (header(TRAIN, 20230101), "train.bin: unknown magic number 20230101 at byte 0; known are 20240520"),
        (
            header(TRAIN)[:-2],
            "train.bin is cut short or damaged: its header (byte 8) says 5,000 tokens of uint16, and 9,998",
        ),
        (header(TRAIN, count=4999), "(byte 8) says 4,999 tokens"),
        (header(TRAIN, 20240801), "train.bin has uint32 by its magic number, the vocabulary needs uint16"),
        (TRAIN.tobytes()[:-1], "train.bin has 9,999 bytes, no whole number of uint16 ids; is it cut short?"),
        (TRAIN.astype(np.uint32), "train.bin: every second id from byte 0 on is 0; were they made with another"),
        (beyond(4321), "train.bin: the id 257 at byte 8,642 is beyond the vocabulary of 257"),
        (header(beyond(4321)), "the id 257 at byte 9,666 is beyond the vocabulary"),
        (TRAIN.astype(np.int64).tobytes() + b"\1", "is it cut short?"),
        (b"", "no file of tokens has 'train' in its name, of 1 with content"),
    ],
)
def test_wrong_files_of_tokens_are_one_line_with_the_place(tmp_path, monkeypatch, train, message):
    monkeypatch.setattr(token_files, "BLOCK", 1000)
    write(tmp_path, train=train, val=VAL)
    assert message in refusal(lambda: load(tmp_path, TOKENS).check(8))


def test_names_that_tell_no_split_are_one_line(tmp_path):
    for names, message in (
        (["train"], "no file of tokens has 'val' in its name"),
        (["val"], "no file of tokens has 'train' in its name"),
        (["train", "val", "more"], "more.bin has none of train, val and test in its name"),
        ([], "no file matches '*.bin'"),
    ):
        write(tmp_path, **dict.fromkeys(names, TRAIN))
        assert message in refusal(load, tmp_path, TOKENS)


def test_the_corpus_names_the_tokenizer_of_its_tokens(tmp_path):
    study = parse_study({"corpus": TOKENS})
    assert study.tokenizer.name == "bytes"
    assert parse_study(study.model_dump(exclude_unset=True)) == study == parse_study(study.model_dump())
    for wrong in ({"tokenizer": {"name": "gpt2"}}, {"tokenizer": {"name": "bpe", "vocab_size": 512}}):
        assert "tokenizer: the corpus is in tokens of 'bytes' already" in refusal(
            parse_study, {"corpus": TOKENS} | wrong
        )
    assert "in tokens of 'bytes' already" in refusal(parse_study, {"corpus": TOKENS}, ["tokenizer.name=gpt2"])


# The section


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("stdlib", "must be a mapping of keys to values, not 'stdlib'; give a name (stdlib, environment,"),
        ({}, "has no source: give a name (stdlib, environment, mqar, needle), or one of files, hf, tokens"),
        ({"flies": ["a"]}, "unknown key 'corpus.flies': give a name"),
        ({"flies": ["a"]}, "did you mean 'files'?"),
        ({"files": ["a"], "colunm": "x"}, "unknown key 'corpus.colunm'; allowed: held_out"),
        ({"files": ["a"], "colunm": "x"}, "did you mean 'column'?"),
        ({"name": "wikipedia"}, "unknown name 'wikipedia'"),
        ({"name": "stdlib", "files": ["a"]}, "has name and files: give a name"),
        ({"files": []}, "corpus: has no source: give a name"),
        ({"files": ["a"], "held_out": 0.5}, "corpus.held_out=0.5: must be a number above 0 and below 0.5"),
        ({"files": ["a"], "limit_bytes": 0}, "corpus.limit_bytes=0: must be a whole number of at least 1"),
        ({"hf": ["a"]}, "corpus.hf=['a']: must be text"),
        ({"tokens": ["*.bin"]}, "needs the key 'corpus.tokenizer'"),
        ({"tokens": ["*.bin"], "tokenizer": "bpe"}, "corpus.tokenizer='bpe': must be one of gpt2,"),
    ],
)
def test_a_wrong_section_is_one_line(section, message):
    assert message in refusal(parse_study, {"corpus": section})

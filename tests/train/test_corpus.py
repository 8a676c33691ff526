"""Laws of corpora: the same text, split and fingerprint wherever the files lie, and one line for every mistake."""

import json
import sys
from pathlib import PurePosixPath

import pytest
from texts import refusal

from train.corpus import _stdlib, load_corpus


def write(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def many():
    return {f"part-{i % 3}/{i}.txt": f"document {i}\n" * (1 + i % 7) for i in range(200)}


def loaded(folder, texts, *patterns):
    """The corpus of the files of a folder that match, after the texts were written there; and all of its text."""
    corpus = load_corpus(files=patterns or ["**/*"], relative_to=[write(folder, texts)])
    return corpus, corpus.train + corpus.val


def test_stdlib_is_large_sane_and_the_same_at_every_call():
    first, second = load_corpus("stdlib"), load_corpus("stdlib")
    assert first == second
    assert first.name == "stdlib"
    assert first.bytes == sum(len(text.encode()) for text in first.train + first.val) > 5e6
    assert 0.05 <= sum(map(len, first.val)) / sum(map(len, first.train + first.val)) <= 0.1


def test_stdlib_holds_no_tests_and_nothing_of_this_machine():
    names = [document.name for document in _stdlib()]
    assert names == sorted(names)
    folders = {folder for name in names for folder in PurePosixPath(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any("_sysconfigdata" in name for name in names)
    assert "json/decoder.py" in names


def test_split_and_fingerprint_do_not_depend_on_where_the_files_lie(tmp_path):
    here, there = write(tmp_path / "here", many()), write(tmp_path / "quite/another/place", many())
    absolute = load_corpus(files=[f"{here}/**/*.txt"])
    relative = load_corpus(files=["part-2/*.txt", "part-0/*.txt", "part-1/*.txt", "part-1/*"], relative_to=[there])
    assert absolute == relative
    assert absolute.name == "files"


@pytest.mark.parametrize("change", ["text", "name", "split"])
def test_fingerprint_tells_any_change(tmp_path, change):
    texts = many()
    before, _ = loaded(tmp_path / "before", texts)
    if change == "text":
        texts["part-0/0.txt"] += "."
    elif change == "name":
        texts["part-0/new.txt"] = texts.pop("part-0/0.txt")
    else:
        texts["part-0/0.txt"] = "huge " * 1_000_000
    assert before.fingerprint != loaded(tmp_path / "after", texts)[0].fingerprint


def test_whole_documents_are_held_out_of_many_and_a_part_of_a_huge_one(tmp_path):
    huge, _ = loaded(tmp_path / "huge", {"huge.txt": "x" * 1_000_000} | {f"{i}.txt": "small\n" for i in range(50)})
    assert 0.09 < sum(map(len, huge.val)) / huge.bytes < 0.11
    corpus, texts = loaded(tmp_path / "many", many())
    assert sorted(texts) == sorted(many().values())
    assert 0.05 <= sum(map(len, corpus.val)) / corpus.bytes <= 0.1


def test_a_document_is_held_out_whatever_its_text_says(tmp_path):
    """The split goes by names: editing a document does not move it to the other side."""
    texts = {f"{i}.txt": f"{i:03}\n" for i in range(100)}
    before, _ = loaded(tmp_path / "a", texts)
    after, _ = loaded(tmp_path / "b", {name: text + "!" for name, text in texts.items()})
    assert [text + "!" for text in before.val] == after.val


@pytest.mark.parametrize("count", [1, 5, 19])
def test_few_documents_give_their_last_tenths(tmp_path, count):
    texts = {f"{i:02}.txt": "".join(f"line {i} {j}\n" for j in range(100)) for i in range(count)}
    corpus, _ = loaded(tmp_path, texts)
    assert [train + val for train, val in zip(corpus.train, corpus.val, strict=True)] == list(texts.values())
    assert all(text.endswith("\n") for text in corpus.train)
    assert 0.08 < sum(map(len, corpus.val)) / corpus.bytes < 0.13


def test_the_first_folder_in_which_a_pattern_matches_wins(tmp_path):
    first, second = write(tmp_path / "1", {"a.txt": "first\n" * 20}), write(tmp_path / "2", {"a.txt": "second\n" * 20})
    write(second, {"only.txt": "only\n" * 20})
    both = load_corpus(files=["a.txt", "only.txt"], relative_to=[first, second])
    text = "".join(both.train + both.val)
    assert [text.count(word) for word in ("first", "only", "second")] == [20, 20, 0]


def test_patterns_are_relative_to_the_current_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(write(tmp_path, {"a [1].txt": "literal\n" * 20}))
    assert load_corpus(files=["a [1].txt"]) == load_corpus(files="a*.txt")


def test_jsonl_gives_a_document_a_line_and_text_comes_back_unchanged(tmp_path):
    texts = [f"document {i}\u2028 \U0001f600\n" for i in range(30)]
    lines = "\n".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2) for i, text in enumerate(texts))
    corpus, documents = loaded(tmp_path, {"a.jsonl": lines + "\n\n"})
    assert sorted(documents) == sorted(texts)
    assert corpus.bytes == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("half.jsonl", rb'{"text": "half \ud83d, whole \ud83d\ude00"}', "half \ufffd, whole \U0001f600"),
        ("mark.txt", b"\xef\xbb\xbfone\r\ntwo\r\n", "one\r\ntwo\r\n"),  # a byte order mark
        ("short.txt", b"xy", "xy"),
    ],
)
def test_text_comes_back_as_utf8_can_write_it(tmp_path, name, content, text):
    assert "".join(loaded(tmp_path, {name: content})[1]) == text


def test_parquet_gives_a_document_a_row(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"document {i}\n" for i in range(30)]
    parquet.write_table(pyarrow.table({"text": texts, "id": list(range(30))}), tmp_path / "a.parquet")
    assert sorted(loaded(tmp_path, {})[1]) == sorted(texts)
    parquet.write_table(pyarrow.table({"body": texts, "id": list(range(30))}), tmp_path / "b.parquet")
    assert "body, id" in refusal(loaded, tmp_path, {}, "b.parquet")
    assert "c.parquet is not a parquet file" in refusal(loaded, tmp_path, {"c.parquet": b"no parquet"}, "c.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "uv sync --extra data" in refusal(loaded, tmp_path, {}, "a.parquet")


def test_mistakes_are_one_line_that_names_the_place(tmp_path):
    for name, content, message in (
        ("latin.txt", b"d\xe9j\xe0", "latin.txt is not UTF-8 text (byte offset 1)"),
        ("broken.jsonl", '{"text": "a"}\n{"text": \n', "broken.jsonl:2 is not JSON"),
        ("textless.jsonl", '{"text": "a"}\n\n{"body": "b"}\n', 'textless.jsonl:3 has no string "text"'),
        ("list.jsonl", "[1]", "list.jsonl:1"),
        ("empty.txt", "", "empty"),
        ("one.txt", "x", "empty"),
    ):
        assert message in refusal(loaded, tmp_path, {name: content}, name)
    assert "'wikipedia'" in (message := refusal(load_corpus, "wikipedia"))
    assert "stdlib" in message
    assert "both" in refusal(load_corpus, "stdlib", files=["a.txt"])
    assert "neither" in refusal(load_corpus)
    elsewhere = refusal(load_corpus, files=["no/*.txt"], relative_to=[tmp_path, tmp_path / "studies"])
    assert "'no/*.txt'" in elsewhere
    assert f"{tmp_path} or {tmp_path / 'studies'}" in elsewhere
    assert f"{tmp_path}/no.txt" in refusal(load_corpus, files=[f"{tmp_path}/no.txt"])


def test_environment_is_the_text_of_installed_packages(tmp_path, monkeypatch):
    texts = {
        "b/x.py": "# x\n" * 50,
        "a/x.py": "# x\n" * 50,  # the same as b/x.py: taken once, under this name
        "a/latin.py": "# -*- coding: latin-1 -*-\n# \xe9\n".encode("latin-1"),
        "a/binary.txt": b"\xff\xfe\x00",
        "a/left.json": "{}",
        "a.dist-info/LICENSE.md": "free " * 40,
    } | {f"c/{n}.rst": f"text number {n} " * 9 for n in range(30)}
    write(tmp_path, texts)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    corpus = load_corpus("environment")
    assert corpus.name == "environment"
    documents = corpus.train + corpus.val
    assert (len(documents), documents.count("# x\n" * 50)) == (33, 1)
    assert any("\xe9" in text for text in documents)
    assert load_corpus("environment") == corpus
    (tmp_path / "c" / "0.rst").write_text("another text")
    assert load_corpus("environment").fingerprint != corpus.fingerprint

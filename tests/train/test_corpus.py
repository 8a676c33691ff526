"""Laws of corpora: the same documents and splits whatever the files look like, and one line for every mistake."""

import gzip
import itertools
import json
import os
import sys
from pathlib import Path, PurePosixPath

import pyarrow
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from texts import refusal

from train.corpus import MANY_DOCUMENTS, SPLITS, Splitter, pieces
from train.sources import Place, files, parse
from train.sources.installed import stdlib

COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


def write(folder, texts):
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def read(*folders, output=None, **section):
    """{split: texts} of a corpus's documents, or of their parts in a split; None: the empty ones."""
    source = parse(section or {"files": ["**/*"]})
    parts = source.parts(Place(folders or [Path.cwd()], output))
    splitter, texts = Splitter(parts, source.held_out), {split: [] for split in (*SPLITS, None)}
    for part in parts:
        for item in splitter.items(part):
            texts[item.split] += [""] if item.begins else []
            texts[item.split][-1] += item.text
    return texts


def whole(folder, *patterns, **section):
    """The documents of files, none of them held out."""
    aside = {split: [str(write(folder.parent, {split: split}) / split)] for split in SPLITS[1:]}
    texts = read(folder, files=list(patterns or ["**/*"]), **aside, **section)
    assert (texts["tune"], texts["test"]) == (["tune"], ["test"])
    return texts["train"]


def rows(texts, name="text"):
    """{suffix: content of such a file} with a document in each row."""
    records = [{"id": n, name: text} for n, text in enumerate(texts)]
    lines = [json.dumps(record, ensure_ascii=n % 2 == 0) + "\n" * (1 + n % 3) for n, record in enumerate(records)]
    parquet.write_table(pyarrow.Table.from_pylist(records), buffer := pyarrow.BufferOutputStream(), compression="none")
    table, lines = buffer.getvalue().to_pybytes(), "".join(lines).encode()
    return {".jsonl": lines, ".ndjson": lines, ".parquet": table}


def packed(content, suffix):
    """Compressed, in two frames."""
    return b"".join(map(COMPRESS[suffix], (content[: len(content) // 2], content[len(content) // 2 :])))


TEXTS = [f"document {n}\u2028 d\xe9j\xe0 \U0001f600\r\n" * (1 + n % 7) for n in range(300)]


@pytest.mark.parametrize("block", [1, 5, files.BLOCK])
@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_format_and_compression_gives_the_same_documents(tmp_path, monkeypatch, suffix, block):
    texts = TEXTS[:30] if block == 1 else TEXTS
    monkeypatch.setattr(files, "BLOCK", block)
    for kind, content in rows([*texts, "", None]).items():
        folder = write(tmp_path / kind, {f"a{kind}{suffix}": packed(content, suffix)})
        assert whole(folder) == texts
        assert len(read(folder)[None]) == 2
    folder = write(tmp_path / "t", {f"{n:03}.txt{suffix}": packed(t.encode(), suffix) for n, t in enumerate(texts)})
    assert whole(folder) == texts


@given(
    text=st.lists(st.sampled_from(["\n", "line\n", "x" * 7, "\xe9" * 30])).map("".join),
    cuts=st.lists(st.integers(0, 200)),
    most=st.integers(1, 20),
)
def test_pieces_are_short_give_the_text_back_and_do_not_depend_on_where_it_was_cut(text, cuts, most):
    places = [0, *sorted(cuts), len(text)]
    cut = list(pieces([text], most))
    assert cut == list(pieces((text[a:b] for a, b in zip(places, [*places[1:], None], strict=True)), most))
    assert "".join(cut) == text
    assert all(1 <= len(piece) <= most for piece in cut)
    assert all(following[0] == "\n" or "\n" not in piece[1:] for piece, following in itertools.pairwise(cut))


# Splits


def test_stdlib_is_large_sane_and_the_same_at_every_call():
    first = read(name="stdlib")
    assert first == read(name="stdlib")
    sizes = {split: sum(len(text.encode()) for text in texts) for split, texts in first.items()}
    assert sum(sizes.values()) > 5e6
    assert all(0.025 < sizes[split] / sum(sizes.values()) < 0.1 for split in SPLITS[1:])


def test_stdlib_holds_no_tests_and_nothing_of_this_machine():
    names = stdlib()
    folders = {folder for name in names for folder in PurePosixPath(name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    assert not any("_sysconfigdata" in name for name in names)
    assert "json/decoder.py" in names


def many(count=MANY_DOCUMENTS):
    return {f"part-{n % 3}/{n}.txt": f"document {n}\n" * (1 + n % 7) for n in range(count)}


def test_the_split_does_not_depend_on_where_the_files_lie(tmp_path):
    here, there = write(tmp_path / "here", many()), write(tmp_path / "quite/another/place", many())
    relative = read(there, files=["part-2/*.txt", "part-0/*.txt", "part-1/*.txt", "part-1/*"])
    assert relative == read(files=[f"{here}/**/*.txt"])
    assert sorted(itertools.chain(*relative.values())) == sorted(many().values())
    assert all(0.02 * MANY_DOCUMENTS < len(relative[split]) < 0.1 * MANY_DOCUMENTS for split in SPLITS[1:])


def test_a_document_is_split_off_by_its_name_and_a_row_by_its_text(tmp_path):
    """A file that is edited stays in its split, and so does a row when others come before it."""
    before = read(write(tmp_path / "a", many()))
    after = read(write(tmp_path / "b", {name: text + "!" for name, text in many().items()}))
    assert {split: [text + "!" for text in texts] for split, texts in before.items()} == after
    one, other = (read(write(tmp_path / str(n), {"a.jsonl": rows(TEXTS[n:])[".jsonl"]})) for n in (0, 9))
    assert all(set(other[split]) <= set(one[split]) for split in SPLITS)


@pytest.mark.parametrize("count", [1, 5, MANY_DOCUMENTS - 1])
def test_few_documents_are_cut_by_lines(tmp_path, count):
    texts = {f"{i:03}.txt": "".join(f"line {i} {j}\n" for j in range(1000)) for i in range(count)}
    split = read(write(tmp_path, texts))
    assert list(map("".join, zip(*(split[name] for name in SPLITS), strict=True))) == list(texts.values())
    assert all(text.startswith("\n") for name in SPLITS[1:] for text in split[name])  # not within a line
    size = sum(map(len, texts.values()))
    assert all(0.03 < sum(map(len, split[name])) / size < 0.07 for name in SPLITS[1:])


def test_files_that_are_a_split_of_their_own_and_a_larger_share(tmp_path):
    write(tmp_path, many() | {"val/1.txt": "tuned\n", "val/2.txt": "tested\n"})
    both = read(tmp_path, files=["**/*.txt"], tune=["val/1.txt"], test=["val/2*"])
    assert (both["tune"], both["test"], len(both["train"])) == (["tuned\n"], ["tested\n"], MANY_DOCUMENTS)
    one = read(tmp_path, files=["part-*/*"], tune=["val/*"], held_out=0.3)
    assert len(one["tune"]) == 2
    assert 0.2 < len(one["test"]) / MANY_DOCUMENTS < 0.4


# Which files


def test_a_file_is_read_once_whatever_its_names(tmp_path):
    write(tmp_path, {"texts/a.txt": "first", "texts/b.txt": "second", "elsewhere/d/e.txt": "third"})
    (tmp_path / "texts" / "linked.txt").symlink_to(tmp_path / "texts" / "a.txt")
    (tmp_path / "texts" / "sub").symlink_to(tmp_path / "elsewhere" / "d")
    assert sorted(whole(tmp_path / "texts", "*.txt", "**/*", "a.*", "../elsewhere/d/*")) == ["first", "second", "third"]


def test_the_first_folder_in_which_a_pattern_matches_wins(tmp_path):
    first, second = write(tmp_path / "1", {"a.txt": "first"}), write(tmp_path / "2", {"a.txt": "second"})
    write(second, {"only.txt": "only", "a [1].txt": "literal"})
    names = {"files": ["a.txt", "only.txt", "a [1].txt"], "tune": ["a.txt"], "test": ["only.txt"]}
    texts = read(first, second, **names)
    assert [texts[split] for split in SPLITS] == [["literal"], ["first"], ["only"]]


def test_a_circle_of_links_is_refused(tmp_path):
    write(tmp_path, {"a.txt": "text"})
    for name in ("one", "two"):
        (tmp_path / name).symlink_to(tmp_path)
    assert "leads through links in a circle" in refusal(read, tmp_path, files=["**/*.txt"])


PLAN = '{"runs": [], "settings": {}}'


def test_what_studies_and_caches_hold_is_no_text(tmp_path):
    write(tmp_path, {"a.md": "text", "b.jsonl": '{"text": "row"}'})
    write(
        tmp_path,
        {"runs/old/plan.json": PLAN, "plan.json": "{}", "runs/old/x/metrics.jsonl": "{}", "runs/old/results.md": "#"},
    )
    write(tmp_path, {"runs/now/results.md": "#", f"cache/tokens-{16 * '0'}/manifest.json": "{}"})
    write(tmp_path, {f"cache/{name}": "{}" for name in (f"latest-{16 * 'f'}.json", f"tokens-{16 * '0'}.lock")})
    for pattern, texts in (("**/*.md", ["text"]), ("**/*.jsonl", ["row"]), ("**/*[dl]", ["text", "row"])):
        found = read(tmp_path, output=tmp_path / "runs" / "now", files=[pattern])
        assert sorted(itertools.chain(*found.values())) == sorted(texts), pattern


# What is in them


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("half.jsonl", rb'{"text": "half \ud83d, whole \ud83d\ude00"}', "half \ufffd, whole \U0001f600"),
        ("mark.txt", b"\xef\xbb\xbfone\r\ntwo \xef\xbb\xbf\r\n", "one\r\ntwo \ufeff\r\n"),  # a byte order mark
        ("mark.jsonl", b'\xef\xbb\xbf{"text": "one"}', "one"),
        ("short.txt", b"xy", "xy"),
    ],
)
def test_text_comes_back_as_utf8_can_write_it(tmp_path, monkeypatch, name, content, text):
    for block in (1, files.BLOCK):
        monkeypatch.setattr(files, "BLOCK", block)
        assert whole(write(tmp_path / "x", {name: content})) == [text]


def test_a_column_may_have_another_name(tmp_path):
    for kind, content in rows(TEXTS[:9], "body").items():
        folder = write(tmp_path / kind, {f"a{kind}": content})
        assert whole(folder, column="body") == TEXTS[:9]
        message = refusal(read, folder)
        assert f"a{kind}" in message
        assert "has no 'text', but id, body: name the one with text as column" in message
        assert "has a int in 'id'" in refusal(read, folder, files=["*"], column="id")


def wrong_files():
    """(name, content, what is said of it)"""
    lines, table = (rows(TEXTS * 9)[kind] for kind in (".jsonl", ".parquet"))
    char_ids = b"".join(bytes([n % 65, 0]) for n in range(9_999))  # nanoGPT's shakespeare_char, uint16
    yield "latin.txt", "\xe9".encode() * 9 + b"d\xe9j\xe0", "latin.txt is not UTF-8 text (byte offset 19)"
    yield "nul.txt", "\xe9".encode() * 9 + b"a\0", "nul.txt is no text (a NUL at byte offset 19)"
    yield "train.txt", char_ids, "train.txt is no text (a NUL at byte offset 0)"
    yield "train.bin", char_ids, "train.bin is no text: files of token ids go with corpus: {tokens:"
    for kind in ("json", "csv", "tsv", "json.gz"):
        yield f"a.{kind}", "[]", f"a.{kind} is no text: write a document a line as .jsonl"
    yield "broken.jsonl", b'{"text": "a"}\n{"text": \n' + lines, "broken.jsonl:2 is not JSON"
    yield "deep.jsonl", "[" * 99_999, "deep.jsonl:1 is not JSON"
    yield "latin.jsonl", b'{"text": "d\xe9j\xe0"}', "latin.jsonl:1 is not JSON (invalid continuation byte)"
    yield "textless.jsonl", '{"text": "a"}\n\n{"body": "b"}\n', "textless.jsonl:3 has no 'text', but body"
    yield "list.jsonl", "[1]", "list.jsonl:1 is no object"
    for suffix in (".gz", ".zst"):
        data = COMPRESS[suffix](lines)
        yield f"none.txt{suffix}", lines, f"none.txt{suffix} is damaged, or is not what its name says"
        for name, content in (("cut", data[:-9]), ("junk", data + b"junk"), ("none", lines)):
            yield f"{name}.jsonl{suffix}", content, f"{name}.jsonl{suffix} is damaged, or is not what its name says"
        yield (
            f"bits.jsonl{suffix}",
            data[:99] + b"bits" + data[103:],
            f"bits.jsonl{suffix}",
        )  # the text may be wrong first
    for name, content in (
        ("cut", table[:-9]),
        ("text", b"no parquet"),
        ("bits", table.replace(b"document 3", b"document \xff")),
    ):
        yield f"{name}.parquet", content, f"{name}.parquet is damaged, or is not what its name says, near byte "


@pytest.mark.parametrize("block", [1, files.BLOCK])
def test_mistakes_are_one_line_that_names_the_place(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "BLOCK", block)
    for name, content, message in wrong_files():
        if block > 1 or len(content) < 30_000:
            assert message in refusal(read, write(tmp_path, {name: content}), files=[name])


def test_patterns_without_files_are_one_line(tmp_path):
    write(tmp_path, {"folder/a.txt": "a", "saved/state.json": "{}"})
    elsewhere = refusal(read, tmp_path, tmp_path / "studies", files=["no/*.txt"])
    assert f"no file matches 'no/*.txt' in {tmp_path} or {tmp_path / 'studies'}" in elsewhere
    assert f"{tmp_path}/no.txt" in refusal(read, files=[f"{tmp_path}/no.txt"])
    for folder in ("folder", "saved"):
        message = refusal(read, tmp_path, files=[folder])
        assert f"{folder!r} is a folder; give a pattern for its files, such as '{folder}/**/*.txt'" in message
        assert "hf" in message
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert "no file matches 'gone.txt'" in refusal(read, tmp_path, files=["gone.txt"])


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
    """Root reads all files, so that a refusal is played."""
    names = [f"a{kind}{suffix}" for kind in (".txt", ".jsonl", ".parquet") for suffix in COMPRESS]
    write(tmp_path, dict.fromkeys(names, "a"))
    monkeypatch.setattr(Path, "open", lambda *_: os.open("/", os.O_RDWR))
    for name in names:
        assert f"cannot read {tmp_path / name}: Is a directory" in refusal(read, tmp_path, files=[name])


def test_a_library_that_is_missing_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    write(tmp_path, {"a.parquet": rows(TEXTS)[".parquet"], "b.txt.zst": b""})
    for name, section in (
        ("pyarrow", {"files": ["*.parquet"]}),
        ("zstandard", {"files": ["*.zst"]}),
        ("datasets", {"hf": "x"}),
    ):
        monkeypatch.setitem(sys.modules, name, None)
        assert "uv sync --extra data" in refusal(read, tmp_path, **section)


def test_environment_is_the_text_of_installed_packages(tmp_path, monkeypatch):
    texts = {
        "b/x.py": "# x\n" * 50,
        "a/x.py": "# x\n" * 50,  # the same as b/x.py: in the same split
        "a/latin.py": "# -*- coding: latin-1 -*-\n# \xe9\n".encode("latin-1"),
        "a/binary.txt": b"\xff\xfe\x00",
        "a/left.json": "{}",
        "a.dist-info/LICENSE.md": "free " * 40,
    } | {f"c/{n}.rst": f"text number {n} " * 9 for n in range(MANY_DOCUMENTS)}
    write(tmp_path, texts)
    (tmp_path / "gone.py").symlink_to(tmp_path / "nowhere.py")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    found = read(name="environment")
    assert sum(len(found[split]) for split in SPLITS) == MANY_DOCUMENTS + 4
    assert [found[split].count("# x\n" * 50) for split in SPLITS].count(0) == 2
    assert any("\xe9" in text for texts in found.values() for text in texts)
    assert found[None] == [""]  # what is no text

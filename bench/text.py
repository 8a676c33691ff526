"""Reading a corpus that is larger than memory should be: time, tokens per second and peak memory of each process.

    uv run python bench/text.py --mib 4096 --out /tmp/corpus

Makes a corpus from the text of the installed packages in DIR, half .jsonl.zst and half .parquet, which is deleted at
the end; then tokenises it, starts again, and trains a run as a worker does. `--kills` ends the pass by SIGKILL that
often, at random times, and compares what it leaves with a pass that was left alone. tiktoken's batch encoder, on as
many threads, is what the pass is compared with.
"""

from pairs import Report, parser, quartiles

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import zstandard
from pyarrow import parquet, table

from train.machine import cores
from train.sources.installed import environment, read_source
from train.tokenizer import load_tokenizer
from train.tokens import TokenizerConfig

SHARD = 2**26  # bytes of text in a file
DOCUMENT = 6000  # characters at most
VOCABULARY = {"name": "bpe", "vocab_size": 8192}
PEAK = """
import atexit, json, sys, time
from pathlib import Path
start = time.perf_counter()
status = lambda: next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
atexit.register(lambda: print("peak", status(), file=sys.stderr))
"""
IMPORTS = PEAK + "import lightning, torch"
READ = (
    PEAK
    + """
from train.study import load_data, parse_study, read_yaml
path = Path(sys.argv[1])
data = load_data(parse_study(read_yaml(path)), path, path.parent / "runs")
print(json.dumps(data.facts | {"seconds": time.perf_counter() - start, "folder": str(data.folder)}))
"""
)
COMMAND = PEAK + "import kvfrontier; kvfrontier.main(sys.argv[1:])"


def documents() -> Iterator[str]:
    """The text of the installed packages in short documents, again and again, each with the number of its round."""
    for turn in itertools.count():
        for name, path in sorted(environment().items()):
            for document in read_source(path, name, True, _NoPart):
                (text,) = document.chunks()
                for start in range(0, len(text), DOCUMENT):
                    yield f"{turn}\n{text[start : start + DOCUMENT]}"


class _NoPart:
    done = 0


def make_corpus(folder: Path, size: int) -> list[str]:
    """Writes about `size` bytes of documents; returns some of them."""
    source, some = documents(), []
    folder.mkdir(parents=True)
    for n in range(-(-size // SHARD)):
        texts, written = [], 0
        while written < min(SHARD, size - n * SHARD):
            texts.append(next(source))
            written += len(texts[-1].encode())
        some = some or texts
        if n % 2:
            parquet.write_table(table({"text": texts}), folder / f"{n:04}.parquet", row_group_size=4096)
        else:
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
            (folder / f"{n:04}.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))
    return some


def timed(code: str, *arguments: object, kill_after: float | None = None) -> tuple[float, str, str]:
    """(seconds, peak memory in MiB, output) of a Python process. RuntimeError if it fails, except by a kill."""
    start = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], **pipes)
    if kill_after is not None:
        time.sleep(kill_after)
        child.send_signal(signal.SIGKILL)
    output, errors = child.communicate()
    if child.returncode and kill_after is None:
        raise RuntimeError(f"a process ended with status {child.returncode}: {errors[-300:]}")
    peak = [line for line in errors.splitlines() if line.startswith("peak")]
    return time.perf_counter() - start, f"{int(peak[-1].split()[1]) >> 10}" if peak else "-", output


def digest(folder: Path) -> str:
    """Of all token files and the facts in a manifest."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.bin")):
        digest.update(path.read_bytes())
    digest.update(json.dumps(json.loads((folder / "manifest.json").read_text())["facts"]).encode())
    return digest.hexdigest()


def main() -> int:
    options = parser(__doc__.splitlines()[0], mib=256, kills=0)
    options.add_argument("--out", type=Path, default=Path("/tmp/kvfrontier-text"), help="a new folder")
    args = options.parse_args()
    args.out.mkdir(parents=True)
    os.environ["KVFRONTIER_CACHE"] = str(args.out / "cache")
    report = Report(f"a corpus of {args.mib} MiB", args, ["what", "seconds", "tokens/s", "of tiktoken", "peak MiB"])
    try:
        return report.measure(["text"], lambda _: measure(report, args))
    finally:
        shutil.rmtree(args.out, ignore_errors=True)


def measure(report: Report, args) -> None:
    texts, study = make_corpus(args.out / "texts", args.mib * 2**20), args.out / "study.yaml"
    settings = {"corpus": {"files": ["texts/*"]}, "tokenizer": VOCABULARY, "seeds": [0]}
    settings |= {"variants": [{"label": "mha", "arch": "mha"}], "train": {"tokens": 2048, "batch_tokens": 1024}}
    study.write_text(json.dumps(settings | {"eval": {"loss_tokens": 1024}}))
    runs = args.out / "runs"

    seconds, memory, output = timed(READ, study)
    facts = json.loads(output)
    tokens = facts["train_tokens"] + facts["tune_tokens"] + facts["val_tokens"]
    encoding = load_tokenizer(TokenizerConfig(**VOCABULARY), Path(facts["folder"]))
    alone = []
    for _ in range(3):
        start = time.perf_counter()
        ids = encoding.encode_ordinary_batch(texts, num_threads=cores())
        alone.append(sum(map(len, ids)) / (time.perf_counter() - start))
    low, median, high = quartiles(alone)
    report.add("tiktoken's batch encoder", "-", f"{median:,.0f} ({low:,.0f}-{high:,.0f})", "1.00", "-")
    rate = tokens / facts["seconds"]
    report.add("first start: the whole pass", f"{seconds:.1f}", f"{rate:,.0f}", f"{rate / median:.2f}", memory)

    later = {
        "import torch, lightning": (IMPORTS,),
        "second start: the text's tokens": (READ, study),
        "a command that trains two steps": (COMMAND, "train", study, "--out", runs),
        "a worker that trains two steps": (COMMAND, "train", runs, "--run", "mha seed 0"),
    }
    for what, command in later.items():
        shutil.rmtree(runs / "runs", ignore_errors=True)
        seconds, memory, _ = timed(*command)
        report.add(what, f"{seconds:.1f}", "-", "-", memory)

    if args.kills:
        folder = Path(facts["folder"])
        whole = digest(folder)
        shutil.rmtree(folder)
        for _ in range(args.kills):
            timed(READ, study, kill_after=random.uniform(0.2, 1.2) * facts["seconds"] / args.kills)
        seconds, memory, _ = timed(READ, study)
        same = digest(folder) == whole
        report.add(
            f"killed {args.kills} times: {'the same' if same else 'OTHER'} bytes", f"{seconds:.1f}", "-", "-", memory
        )
        if not same:
            raise RuntimeError("a pass that was killed left other tokens")


if __name__ == "__main__":
    sys.exit(main())

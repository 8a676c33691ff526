"""The study h100 on one GPU, in pieces of at most ten minutes, and what it found gathered in one archive.

    python bench/h100.py --out DIR                        # a piece; again for the next, until all is done
    python bench/h100.py --out DIR --from h100.tar.gz     # on another machine: with what earlier pieces had finished
    python bench/h100.py --out DIR --set train.tokens=60_000_000 --set train.lr=2e-3    # in half an hour, by estimate
    python bench/h100.py --out DIR --study quick --seconds 60 --fit-context 1024 --fit-gb 0.5    # a miniature, on a CPU

A piece trains, is stopped when the time for evaluation has come (with a checkpoint, which the next piece goes on from),
evaluates what is trained and, if time is left, draws and finds out how large a batch fits into memory. What has come
of it is then in DIR/<study>.tar.gz: results, figures, tables, report and the records of all runs that are done, but no
weights, so that a run that is not done can go on only on the same machine. The whole study is 16 billion tokens, hours
of an H100. Needs no installation.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

FOUND = "results.json", "results.csv", "report.html", "figures", "tables", "pieces.json", "fits.json"
RECORDS = "record.json", "config.json", "metrics.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the archive")
    parser.add_argument("--study", default="h100")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seconds", type=int, default=540, help="of the whole piece (default: 540)")
    parser.add_argument("--eval-seconds", type=int, help="of them for evaluation (default: a third)")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="ARCHIVE", help="of an earlier piece")
    parser.add_argument("--fit-context", type=int, default=32768, help="tokens of each sequence that is to fit")
    parser.add_argument("--fit-gb", type=float, help="memory to fit into (default: the GPU's)")
    args = parser.parse_args()
    began = time.monotonic()
    left = lambda reserve=0.0: args.seconds - reserve - (time.monotonic() - began)  # noqa: E731
    directory = Path("runs") / Path(args.study).stem
    if args.earlier:
        with tarfile.open(args.earlier) as archive:
            archive.extractall(directory, filter="data")
    what = [args.study, "--out", str(directory), *(word for each in args.overrides for word in ("--set", each))]
    pieces = json.loads((directory / "pieces.json").read_text()) if (directory / "pieces.json").exists() else []
    for_evaluation, for_drawing = args.eval_seconds or args.seconds / 3, args.seconds / 6
    statuses = {
        "train": kvfrontier(["train", *what], left(for_evaluation)),
        "eval": kvfrontier(["eval", *what], left(for_drawing)),
    }
    states = [f"{name}  {state}" for name, state in run_states(directory).items()]
    pieces.append(
        {
            "command": " ".join(sys.argv),
            "device": device(),
            "statuses": statuses,
            "done": sum(line.endswith("  done") for line in states),
            "runs": len(states),
        }
    )
    archive = args.out / f"{directory.name}.tar.gz"

    def keep() -> None:
        pieces[-1]["seconds"] = time.monotonic() - began
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "pieces.json").write_text(json.dumps(pieces, indent=1) + "\n")
        gather(directory, archive)

    keep()  # before what may take longer than is left
    if (directory / "results.json").exists() and left() > for_drawing / 2:
        statuses["plot"] = kvfrontier(["plot", str(directory)], left())
        memory = args.fit_gb * 1e9 if args.fit_gb else gpu_memory()
        if memory and left() > for_drawing / 2:
            records = json.loads((directory / "results.json").read_text())["runs"]
            fits = {
                "memory_bytes": memory,
                "context": args.fit_context,
                "batch": fitting(records, memory, args.fit_context),
            }
            (directory / "fits.json").write_text(json.dumps(fits, indent=1) + "\n")
        keep()
    print("\n".join(states))
    all_done = bool(states) and all(line.endswith("  done") for line in states)
    print(
        f"{pieces[-1]['done']} of {len(states)} runs are done" + ("" if all_done else ": give the same command again")
    )
    return 0 if all_done else 3


def kvfrontier(arguments: list[str], seconds: float) -> int | str:
    """The exit status of a command, which is asked to stop after so many seconds and then has 30 more."""
    if seconds < 5:
        return "no time left"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    child = subprocess.Popen(
        [sys.executable, ROOT / "kvfrontier.py", *arguments], env=os.environ | {"PYTHONPATH": path}
    )
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGTERM)
    try:
        return child.wait(30)
    except subprocess.TimeoutExpired:
        child.kill()
        return child.wait()


def gpu_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0


def device() -> str:
    import torch

    from train.machine import device_name, find_device

    return f"{device_name(find_device())}, torch {torch.__version__}"


def run_states(directory: Path) -> dict[str, str]:
    """Of each run by name; {} where the time did not even do for the corpus."""
    from train.errors import InputError
    from train.store import states

    try:
        return states(directory)
    except InputError:
        return {}


def fitting(records: list[dict], memory: float, context: int) -> dict[str, dict]:
    """The largest batch of sequences of `context` tokens that memory holds beside the weights: computed for each
    variant from its formula, and tried, until a decode step goes through, for the first and the smallest cache."""
    import torch

    from archs import build
    from train.machine import find_device

    device, found = find_device(), {}
    models = {record["label"]: record for record in records}
    stored = {}
    for label, record in models.items():
        dtype = getattr(torch, record["kv"]["dtype"])
        with torch.device("meta"):
            model = build(record["arch"], **record["options"])
        weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        stored[label] = model.kv_stored_bytes(context, dtype)
        found[label] = {"bytes_a_sequence": stored[label], "computed": int((memory - weights) // stored[label])}
    for label in {next(iter(stored)), min(stored, key=stored.get)}:
        record, batch = models[label], found[label]["computed"]
        model = build(record["arch"], **record["options"]).to(device, getattr(torch, record["kv"]["dtype"])).eval()
        while batch and not holds(model, batch, context, memory):
            batch -= max(1, batch // 50)
        found[label]["tried"] = batch
        del model
    return found


def holds(model, batch: int, context: int, memory: float) -> bool:
    """Whether a cache for so many sequences can be had, written to its end, and decoded from."""
    import torch

    tokens = torch.zeros(batch, dtype=torch.long, device=model.embed.weight.device)
    on_gpu = tokens.is_cuda
    try:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory / gpu_memory()))
        with torch.inference_mode():
            cache = model.new_cache(batch, context)
            cache.length = context - 1
            model.decode(tokens, cache)
        weights = sum(p.nbytes for p in model.parameters())
        return on_gpu or weights + cache.nbytes <= memory
    except torch.OutOfMemoryError:
        return False


def gather(directory: Path, path: Path) -> None:
    """Without runs that are not evaluated: elsewhere, without their weights, they could not be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    done = [
        record.parent
        for record in sorted([*directory.glob("runs/*/*/record.json"), *directory.glob("tuning/*/*/record.json")])
        if record.is_relative_to(directory / "tuning") or "eval_key" in json.loads(record.read_text())
    ]
    beside = path.with_name(f"{path.name}.tmp")
    with tarfile.open(beside, "w:gz") as archive:
        for place in [directory / name for name in FOUND] + [run / name for run in done for name in RECORDS]:
            if place.exists():
                archive.add(place, place.relative_to(directory))
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())

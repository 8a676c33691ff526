"""All benches within a time, the most important first.

    uv run python bench/all.py --out DIR

Each bench is a process, gets its share of the time that is left, and appends its rows to DIR/bench.jsonl and its output
to a log of its own. Whether kernels are right comes first; on a GPU models are of GPT-2's size. A step that fails does
not stop the others. The exit status is 1 if one failed or had to be stopped.
"""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHAPE = "--vocab-size 50304 --width 768 --layers 12 --heads 12"
VARIANTS = "mha 'yoco kv_heads=4 window=256' 'yoco kv_heads=4 self_decoder=gret' 'mla kv_rank=256 rope_dim=32' "
VARIANTS += "'gqa kv_heads=4' mqa"
MODELS = f"{SHAPE} --variants {VARIANTS}"
GPU_TESTS = [f"tests/archs/{p.name}" for p in sorted(ROOT.glob("tests/archs/*.py")) if '"cuda"' in p.read_text("utf-8")]
STOP = 0.6  # share of a step's time after which its bench begins nothing more

# name -> (share of the time, what Python runs), in order of value
CPU = {  # in the shapes of the README, which are the defaults
    "check": (1, "-m kvfrontier check quick"),
    "roof": (2, "bench/roof.py"),
    "attention": (1, "bench/attention.py"),
    "decode": (3, "bench/decode.py"),
    "training": (3, "bench/training.py"),
    "loss": (1, "bench/loss.py"),
    "paging": (1, "bench/paging.py"),
}
GPU = {
    "check": (2, "-m kvfrontier check small"),
    "tests": (3, f"-m pytest -q {' '.join(GPU_TESTS)}"),
    "roof": (4, f"bench/roof.py {MODELS} --batch 128 --context 8192"),
    "attention": (2, "bench/attention.py --batch 256"),
    "decode": (4, f"bench/decode.py {MODELS} --batch 32 --context 4096"),
    "training": (6, f"bench/training.py {MODELS} --batch 32 --context 1024"),
    "loss": (1, "bench/loss.py --vocab-size 50304 --width 768 --batch 32 --context 1024"),
    "roof-64k": (2, f"bench/roof.py {MODELS} --batch 8 --context 65536"),
    "attention-64k": (2, "bench/attention.py --batch 16 --context 65536"),
    "training-compiled": (2, f"bench/training.py {SHAPE} --batch 32 --context 1024 --variants mha --compiled-peer"),
    "paging": (2, f"bench/paging.py {MODELS} --batch 64 --context 8192"),
    "tiles": (4, "bench/tiles.py"),
    "tiles-64k": (4, "bench/tiles.py --batch 16 --context 65536"),
}


def run(command: str, seconds: float, log: Path, rows: Path) -> str:
    """Runs one step for at most `seconds`. Returns how it ended: `done`, or what went wrong."""
    words = shlex.split(command)
    if words[0].startswith("bench/"):
        words += ["--json", str(rows), "--seconds", f"{STOP * seconds:.0f}"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    how = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with log.open("w", encoding="utf-8") as f:
        child = subprocess.Popen([sys.executable, *words], stdout=f, **how)
        try:
            status = child.wait(seconds)
            return "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # its own children as well, which would share the device
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def stop(signum: int, frame: object) -> None:
    print(f"stopped by {signal.Signals(signum).name}; the rows so far are kept", file=sys.stderr)
    sys.exit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="time for all of them (default: 10)")
    parser.add_argument("--out", type=Path, required=True, help="directory for bench.jsonl and the logs")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    import torch

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, stop)
    steps = GPU if torch.cuda.is_available() else CPU
    failures, shares = [], sum(share for share, _ in steps.values())
    for number, (name, (share, command)) in enumerate(steps.items(), 1):
        left = end - time.monotonic()
        seconds, shares = left * share / shares, shares - share
        print(f"[{number}/{len(steps)}] {name}: at most {seconds:.0f} s, {left / 60:.1f} minutes left", flush=True)
        log = out / f"{name}.log"
        result = run(command, seconds, log, out / "bench.jsonl")
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-25:]))
        print(f"{name}: {result}, {time.monotonic() - end + left:.0f} s", flush=True)
        if result != "done":
            failures.append(f"{name}: {result}; see {log}")
    print("\n".join([f"the rows are in {out / 'bench.jsonl'}", *failures]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Everything that has to be measured on a GPU, in two runs of less than ten minutes each, and a third for tuning.

    python bench/gpu.py 1 --out DIR     correctness, decode of whole models, decode attention
    python bench/gpu.py 2 --out DIR     training steps, prefill and decode against transformers, longer contexts
    python bench/gpu.py 3 --out DIR     the decode kernel's tiles beside others

Needs no installation, but jsonargparse and rich on the PYTHONPATH: the packages are taken from this checkout. Each step
writes its output to DIR/<step>.log and its numbers to DIR/numbers.jsonl; a step that fails or takes too long does not
stop the others.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHAPE_124M = ["--vocab-size", "50304", "--width", "768", "--layers", "12", "--heads", "12"]
VARIANTS = ["--variants", "mha", "gqa kv_heads=4", "mqa", "mla kv_rank=256 rope_dim=32"]
VARIANTS += ["yoco kv_heads=4 window=256", "yoco kv_heads=4 self_decoder=gret"]
TRAINED = ["--variants", "mha", *VARIANTS[4:], *VARIANTS[2:4]]  # what matters most first, should time run out
LATENT = ["--kv-rank", "256", "--rope-dim", "32"]
TRAINING_124M = [*SHAPE_124M, "--context", "1024", "--batch", "32"]
BF16 = ["bench/attention.py", "--dtype", "bf16", *LATENT]
TESTS = [f"tests/archs/test_{name}.py" for name in ("cuda", "split_kv", "retention", "graph")]
PARTS: dict[str, list[tuple[str, int, list[str]]]] = {  # name, seconds at most, command
    "1": [
        ("tests", 130, ["-m", "pytest", "-q", *TESTS]),
        ("roof", 200, ["bench/roof.py", *SHAPE_124M, *VARIANTS, "--batch", "128", "--context", "8192"]),
        ("attention-8k-256", 90, [*BF16, "--batch", "256"]),
        ("attention-8k-64", 80, [*BF16, "--batch", "64"]),
        ("attention-64k-16", 80, [*BF16, "--batch", "16", "--context", "65536"]),
    ],
    "2": [
        ("training", 260, ["bench/training.py", *TRAINING_124M, *TRAINED, "--seconds", "190"]),
        ("training-compiled-peer", 90, ["bench/training.py", *TRAINING_124M, "--variants", "mha", "--compiled-peer"]),
        ("decode", 160, ["bench/decode.py", *SHAPE_124M, *VARIANTS, "--dtype", "bf16", "--batch", "32",
                         "--context", "4096"]),
        ("roof-long", 80, ["bench/roof.py", *SHAPE_124M, *VARIANTS, "--batch", "8", "--context", "65536"]),
    ],
    "3": [
        ("tiles-8k", 300, ["bench/tiles.py", *LATENT]),
        ("tiles-64k", 250, ["bench/tiles.py", *LATENT, "--batch", "16", "--context", "65536"]),
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True, help="directory for logs and numbers")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    for name, seconds, command in PARTS[args.part]:
        if command[0].startswith("bench/"):
            command = [*command, "--json", str((args.out / "numbers.jsonl").resolve())]
        log = args.out / f"{name}.log"
        start = time.monotonic()
        with log.open("w", encoding="utf-8") as f:
            child = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment,
                stdout=f,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = child.wait(seconds)
            except subprocess.TimeoutExpired:
                code = f"stopped after {seconds} s"
            finally:
                with contextlib.suppress(ProcessLookupError):  # with processes of its own, which would share the GPU
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        print(f"== {name}: {code}, {time.monotonic() - start:.0f} s", flush=True)
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-25:]), flush=True)


if __name__ == "__main__":
    main()

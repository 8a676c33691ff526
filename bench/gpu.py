"""Everything that has to be measured on a GPU, in two runs of less than ten minutes each.

    python bench/gpu.py 1 --out DIR     correctness, decode attention, decode of whole models
    python bench/gpu.py 2 --out DIR     training steps, prefill and decode against transformers, longer contexts

Needs no installation, but jsonargparse and rich on the PYTHONPATH: the packages are taken from this checkout. Each step
writes its output to DIR/<step>.log and its numbers to DIR/numbers.jsonl; a step that fails or takes too long does not
stop the others.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHAPE_124M = ["--vocab-size", "50304", "--width", "768", "--layers", "12", "--heads", "12"]
VARIANTS = ["--variants", "mha", "gqa kv_heads=4", "mqa", "mla kv_rank=256 rope_dim=32"]
VARIANTS += ["yoco kv_heads=4 window=256", "yoco kv_heads=4 self_decoder=gret"]
LATENT = ["--kv-rank", "256", "--rope-dim", "32"]
LONG = ["--batch", "16", "--context", "65536"]
TRAINING_124M = [*SHAPE_124M, "--context", "1024", "--batch", "32"]
TESTS = [f"tests/archs/test_{name}.py" for name in ("cuda", "split_kv", "graph")]
PARTS: dict[str, list[tuple[str, int, list[str]]]] = {  # name, seconds at most, command
    "1": [
        ("tests", 130, ["-m", "pytest", "-q", *TESTS]),
        ("attention-8k", 110, ["bench/attention.py", "--dtype", "bf16", "--batch", "64", *LATENT]),
        ("attention-64k", 110, ["bench/attention.py", "--dtype", "bf16", *LONG, *LATENT]),
        ("roof", 200, ["bench/roof.py", *SHAPE_124M, *VARIANTS, "--batch", "128", "--context", "8192"]),
    ],
    "2": [
        ("training", 220, ["bench/training.py", *TRAINING_124M, *VARIANTS]),
        ("training-compiled-peer", 90, ["bench/training.py", *TRAINING_124M, "--variants", "mha", "--compiled-peer"]),
        ("decode", 160, ["bench/decode.py", *SHAPE_124M, *VARIANTS, "--dtype", "bf16", "--batch", "32",
                         "--context", "4096"]),
        ("roof-long", 80, ["bench/roof.py", *SHAPE_124M, *VARIANTS, "--batch", "8", "--context", "65536"]),
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
            try:
                code = subprocess.run(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=f,
                    stderr=subprocess.STDOUT,
                    timeout=seconds,
                ).returncode
            except subprocess.TimeoutExpired:
                code = f"stopped after {seconds} s"
        print(f"== {name}: {code}, {time.monotonic() - start:.0f} s", flush=True)
        print("\n".join(log.read_text(encoding="utf-8").splitlines()[-25:]), flush=True)


if __name__ == "__main__":
    main()

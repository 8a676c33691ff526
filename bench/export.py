"""The 64 greedy tokens of exported models in transformers and in llama.cpp, against our own.

    uv run --with llama-cpp-python --with gguf python bench/export.py --llama-cpp ~/llama.cpp
    uv run --with llama-cpp-python --with gguf python bench/export.py --llama-cpp ~/llama.cpp runs/quick/runs/*/seed-0

`--llama-cpp` is a checkout, whose convert_hf_to_gguf.py makes a GGUF file of each export. Two things differ from what a
user of it does: the file gets no tokenizer, as the converter knows those of published models alone; and its DeepSeek-V3
needs the rank of the queries' latent, so that a model without one says 0. Without runs, models with random weights are
exported.
"""

from pairs import Report, parser

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import llama_cpp
import torch
from llama import LlamaCpp, no_log
from torch import Tensor
from transformers import AutoModelForCausalLM

from archs import Decoder, build
from train.export import hf_config, write
from train.files import read_json, write_json
from train.trained import load

MADE = 64
SHAPE = {"vocab_size": 512, "width": 64, "layers": 4, "heads": 4, "context": 128}
LATENT = {"kv_rank": 32, "rope_dim": 8}
MODELS = [("mha", {}), ("mqa", {}), ("gqa", {"kv_heads": 2}), ("mla", LATENT), ("mla", LATENT | {"q_rank": 24})]
CONVERT = """
import runpy, sys
from pathlib import Path
script = sys.argv[1]
sys.path.insert(0, str(Path(script).parent))
from conversion import base, load_all_models
load_all_models()
def kinds(kind):
    yield kind
    for each in kind.__subclasses__():
        yield from kinds(each)
for kind in kinds(base.TextModel):
    kind.set_vocab = base.TextModel._set_vocab_none
sys.argv = sys.argv[1:]
runpy.run_path(script, run_name="__main__")
"""


def models(runs: list[Path]) -> Iterator[tuple[str, Decoder]]:
    for run in runs:
        yield str(run), load(run).model
    for arch, options in [] if runs else MODELS:
        torch.manual_seed(0)
        model = build(arch, **SHAPE, **options).eval()
        with torch.no_grad():  # attention is far from uniform, and tokens differ
            for parameter in model.parameters():
                parameter.mul_(3 if parameter.dim() > 1 else 1)
        yield " ".join([arch, *options]), model


def greedy(step, prompt: Tensor) -> tuple[list[int], Tensor]:
    """The tokens that follow, and the first logits: `step(tokens, start)` appends tokens and gives the last logits."""
    logits, tokens = step(prompt, 0), []
    first = logits
    for n in range(MADE):
        tokens.append(int(logits.argmax()))
        logits = step(torch.tensor(tokens[-1:]), len(prompt) + n)
    return tokens, first


def ours(model: Decoder, prompt: Tensor) -> tuple[list[int], Tensor]:
    cache = model.new_cache(1, len(prompt) + MADE)
    return greedy(lambda tokens, start: model.prefill(tokens[None], cache)[0], prompt)


def in_transformers(folder: Path, prompt: Tensor) -> tuple[list[int], Tensor]:
    model, cache = AutoModelForCausalLM.from_pretrained(folder).eval(), []

    def step(tokens: Tensor, start: int) -> Tensor:
        made = model(tokens[None], past_key_values=cache.pop() if cache else None, use_cache=True)
        cache.append(made.past_key_values)
        return made.logits[0, -1]

    return greedy(step, prompt)


def in_llama_cpp(folder: Path, prompt: Tensor, converter: Path) -> tuple[list[int], Tensor]:
    config = read_json(folder / "config.json")
    if config.get("q_lora_rank", 0) is None:
        write_json(folder / "config.json", config | {"q_lora_rank": 0})
    command = [sys.executable, "-c", CONVERT, str(converter), str(folder), "--outtype", "f32", "--outfile"]
    subprocess.run([*command, str(folder / "model.gguf")], check=True, capture_output=True)
    peer = LlamaCpp(folder / "model.gguf", 1, len(prompt) + MADE, flash=False, cache=llama_cpp.GGML_TYPE_F32)

    def step(tokens: Tensor, start: int) -> Tensor:
        peer.append(tokens[None].numpy(), start)
        return peer.logits(config["vocab_size"])[0]

    try:
        return greedy(step, prompt)
    finally:
        peer.close()


@torch.inference_mode()
def main() -> int:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("runs", nargs="*", type=Path)
    options.add_argument("--llama-cpp", type=Path, required=True, help="a checkout of llama.cpp")
    args = options.parse_args()
    llama_cpp.llama_log_set(no_log, None)
    report = Report("greedy tokens of exports", args, ["model", "peer", "equal tokens", "logits differ by"])
    made = dict(models(args.runs))

    def compare(name: str) -> None:
        model = made[name]
        prompt = torch.randint(model.options.vocab_size, (24,), generator=torch.Generator().manual_seed(1))
        expected, logits = ours(model, prompt)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write(folder, model, hf_config(model), None)
            found = {"transformers": in_transformers(folder, prompt)}
            found["llama.cpp"] = in_llama_cpp(folder, prompt, args.llama_cpp / "convert_hf_to_gguf.py")
        for peer, (tokens, theirs) in found.items():
            equal = next((n for n in range(MADE) if tokens[n] != expected[n]), MADE)
            error = (theirs - logits).abs().max().item() / logits.abs().max().item()
            report.add(name, peer, f"{equal} of {MADE}", f"{error:.1e}")
        if any(tokens != expected for tokens, _ in found.values()):
            raise RuntimeError("other tokens than ours")

    return report.measure(made, compare)


if __name__ == "__main__":
    sys.exit(main())

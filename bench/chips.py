"""Whether the Triton kernels compile for GPUs that are not here, and fit into them.

    uv run python bench/chips.py
    uv run python bench/chips.py --chips 86 120 --only "MLA 512+64" "small mla"

Every kernel that a decode step launches is compiled, for the variants of the studies in studies/ that are for a GPU and
for shapes of published models. Kernels whose constants are equal are compiled once, for the first shape that has them.

A row has the bytes of shared memory that a program needs, what `tiling` estimated and what the chip has; the registers
and the spilled bytes of a thread; and the fetches of 16 bytes that go on during other work. The exit status is 1 if a
kernel does not compile, does not fit, or needs more than was estimated. All of it takes half an hour of one core.
"""

from pairs import Report, parser

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from rich.progress import track
from triton import JITFunction, compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from archs.kernels import triton, triton_attention, triton_retention
from archs.kernels.triton_attention import Chip, Tiling
from train.meta import on_meta
from train.study import parse_study, read_yaml
from train.variants import Variant, resolve_variants

CHIPS = {  # by compute capability
    80: Chip(108, 166_912),  # A100
    86: Chip(82, 101_376),  # RTX 3090
    89: Chip(128, 101_376),  # RTX 4090
    90: Chip(132, 232_448),  # H100, H200
    100: Chip(148, 232_448),  # B200
    120: Chip(170, 101_376),  # RTX 5090
}
TENSOR_COLUMNS = 512  # of Blackwell's tensor memory, at most
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64"}
BATCH, CONTEXT = 8, 8192
COLUMNS = ["chip", "shape", "dtype", "kernel", "shared", "estimate", "limit"]
COLUMNS += ["registers", "spilled", "stages", "fetches", "fits"]
Shape = Callable[[torch.dtype], object]  # launches the kernels of a decode step, on tensors without memory


def attention(H: int, G: int, D: int, value_size: int | None, dtype: torch.dtype, sinks: bool = False) -> None:
    """H query heads over G KV heads of D columns; `value_size`: the first of them are the values."""
    q, k, v = (torch.empty(BATCH, *shape, D, dtype=dtype) for shape in ((H, 1), (G, CONTEXT), (G, CONTEXT)))
    v = k[..., :value_size] if value_size else v
    more = torch.empty(1, H, 1, 1, dtype=dtype) if sinks else None
    triton_attention.split_kv_attention(q, k, v, 0.1, torch.zeros(1, dtype=torch.int64), more)


def retention(D: int, dtype: torch.dtype) -> None:
    """8 heads whose states are in `dtype`."""
    vector = torch.empty(BATCH, 8, 1, D)
    state, decay = torch.empty(BATCH, 8, D, D, dtype=dtype), torch.empty(BATCH, 8, 1)
    triton_retention.retain(vector, vector, vector, decay, state)


def variant_of_study(variant: Variant, dtype: torch.dtype) -> None:
    model = on_meta(variant.arch, variant.options).to(dtype)
    cache = model.new_cache(BATCH, CONTEXT)
    model.append(torch.zeros(BATCH, 1, dtype=torch.int64), cache, torch.zeros(1, dtype=torch.int64))


SHAPES: dict[str, Shape] = {
    **{f"MLA 512+64, {H} heads": partial(attention, H, 1, 576, 512) for H in (16, 32, 64, 128)},
    **{f"MLA 256+32, {H} heads": partial(attention, H, 1, 288, 256) for H in (8, 40, 64)},  # MiniCPM3 has 40
    **{f"MQA {D}, {H} heads": partial(attention, H, 1, D, None) for H, D in ((71, 64), (64, 128), (64, 256), (8, 256))},
    "MLA 2+8, 4 heads": partial(attention, 4, 1, 10, 2),  # study recall
    **{f"MHA {D}": partial(attention, 8, 8, D, None) for D in (12, 64, 80, 128, 192, 256)},  # 12: study frontier
    "GQA 128, 64 over 8": partial(attention, 64, 8, 128, None),
    "GQA 128, 28 over 4": partial(attention, 28, 4, 128, None),
    "GQA 128, 96 over 8": partial(attention, 96, 8, 128, None),
    "GQA 64, 64 over 8, sinks": partial(attention, 64, 8, 64, None, sinks=True),  # gpt-oss
    "GQA 64, 232 over 8": partial(attention, 232, 8, 64, None),
    "GQA 256, 8 over 4": partial(attention, 8, 4, 256, None),
    **{f"retention {2**n}": partial(retention, 2**n) for n in range(4, 10)},
}


def study_shapes() -> dict[str, Shape]:
    """Of the studies that a GPU trains in bf16."""
    shapes = {}
    for file in sorted((Path(__file__).parents[1] / "studies").glob("*.yaml")):
        study = parse_study(read_yaml(file))
        if study.train.precision == "fp32":
            continue
        for variant in resolve_variants(study, study.tokenizer.vocab_size, file.parent):
            shapes[f"{file.stem} {variant.label}"] = partial(variant_of_study, variant)
    return shapes


class Launch(NamedTuple):
    """A kernel and what it is launched with, for one chip."""

    capability: int
    shape: str
    dtype: str
    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]

    def __str__(self) -> str:
        return f"sm_{self.capability} {self.shape} {self.dtype} {self.kernel.__name__}"

    def source(self) -> ASTSource:
        """What Triton compiles at such a launch: numbers that are 1 are constants, others may be multiples of 16."""
        types, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value = self.arguments[parameter.name]
            if isinstance(value, torch.Tensor):
                types[parameter.name] = f"*{DTYPES[value.dtype]}"
                multiple = value.storage_offset() * value.itemsize % 16 == 0
            elif parameter.is_constexpr or (type(value) is int and value == 1):
                types[parameter.name], constants[i,] = "constexpr", value
                multiple = False
            else:
                types[parameter.name] = "i32" if isinstance(value, int) else "fp32"
                multiple = isinstance(value, int) and value % 16 == 0
            attributes |= {(i,): [["tt.divisibility", 16]]} if multiple else {}
        return ASTSource(self.kernel, types, constants, attributes)

    def compile(self) -> CompiledKernel:
        return compile(self.source(), target=GPUTarget("cuda", self.capability, 32), options=self.options)

    def estimate(self) -> int | None:
        """The bytes of shared memory that `tiling` counted with."""
        if self.kernel.__name__ != "attend_split":
            return None
        given = self.arguments
        key = given["BLOCK_A"] + (given["BLOCK_R"] if given["R"] else 0)
        tile = Tiling(self.options["num_stages"], given["BLOCK_M"], given["BLOCK_N"], self.options["num_warps"], 1)
        return tile.shared_bytes(key, 0 if given["SHARED"] else given["BLOCK_E"], given["k_ptr"].itemsize)


class Recorder:
    """Takes the place of a kernel, and records instead of launching it."""

    def __init__(self, kernel: JITFunction, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple) -> Callable:
        def launch(*values: object, **options: object) -> None:
            arguments = dict(zip(self.kernel.arg_names, values, strict=False)) | options
            options = {name: value for name, value in options.items() if name not in self.kernel.arg_names}
            self.launches.append((self.kernel, arguments, options))

        return launch


def launches(chips: list[int], shapes: dict[str, Shape]) -> Iterator[Launch]:
    """Of every shape in every dtype, on each of these chips."""
    recorded, made = [], []  # without and with their chip

    def on_each_chip(function: Callable) -> Callable:
        def launch(*arguments: object) -> object:
            for capability in chips:
                recorded.clear()
                with patch.object(triton_attention, "chip", lambda device, chip=CHIPS[capability]: chip):
                    result = function(*arguments)
                made.extend((capability, *launched) for launched in recorded)
            return result

        return launch

    with ExitStack() as stack:
        for module, kernels, name in ((triton_attention, ("attend_split", "combine_splits"), "split_kv_attention"),
                                      (triton_retention, ("retain_columns",), "retain")):  # fmt: skip
            for kernel in kernels:
                stack.enter_context(patch.object(module, kernel, Recorder(getattr(module, kernel), recorded)))
            stack.enter_context(patch.object(module, name, on_each_chip(getattr(module, name))))
        for name in ("usable", "runs_on"):  # or meta tensors would go through PyTorch
            stack.enter_context(patch.object(triton, name, lambda *_: True))
        stack.enter_context(patch("torch.autocast", lambda *_, **__: nullcontext()))  # it knows no meta tensors
        stack.enter_context(torch.device("meta"))
        stack.enter_context(torch.inference_mode())
        for name, shape in shapes.items():
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                made.clear()
                shape(dtype)
                yield from (Launch(capability, name, DTYPES[dtype], *launched) for capability, *launched in made)


def usage(kernel: CompiledKernel) -> tuple[str, str]:
    """Registers and spilled bytes of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
    return re.search(r"REG:(\d+) STACK:(\d+)", result.stdout).groups()


def main() -> int:
    made = parser(__doc__.splitlines()[0])
    made.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS), help="compute capabilities")
    made.add_argument("--only", nargs="+", default=[""], help="kernels whose row has one of these texts")
    args = made.parse_args()
    kernels: dict[tuple, Launch] = {}
    for launch in launches(args.chips, SHAPES | study_shapes()):
        if any(text in str(launch) for text in args.only):
            source = launch.source()
            constants = map(str, (source.signature, source.constants, source.attrs, launch.options))
            kernels.setdefault((launch.capability, launch.kernel, *constants), launch)
    report = Report(f"{len(kernels)} kernels, of batch {BATCH} and context {CONTEXT}", args, COLUMNS)

    def measure(launch: Launch) -> None:
        compiled, estimate, limit = launch.compile(), launch.estimate(), CHIPS[launch.capability].shared_bytes
        shared, columns = compiled.metadata.shared, getattr(compiled.metadata, "tmem_size", None) or 0
        fits = shared <= limit and columns <= TENSOR_COLUMNS
        fetches = len(re.findall(r"cp\.async\.cg\.\S* .*0x10", compiled.asm["ptx"]))
        counts = shared, "" if estimate is None else estimate, limit, *usage(compiled), compiled.metadata.num_stages
        names = f"sm_{launch.capability}", launch.shape, launch.dtype, launch.kernel.__name__
        report.add(*names, *map(str, (*counts, fetches)), "yes" if fits else "no")
        if not fits:
            raise ValueError("does not fit")
        if estimate is not None and shared > estimate:
            raise ValueError("needs more shared memory than the estimate")

    return report.measure(track(kernels.values(), "compiling"), measure)


if __name__ == "__main__":
    sys.exit(main())

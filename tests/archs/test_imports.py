"""The rules of DESIGN.md on who imports whom, and where variants and kernels are named, held against the source."""

import ast
import functools
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from archs import VARIANTS
from archs.kernels import constant

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {"archs": set(), "train": {"archs"}, "eval": {"archs", "train"}, "plots": set()}
MAY_IMPORT |= {"kvfrontier": {*MAY_IMPORT}, "bench": {*MAY_IMPORT, "kvfrontier"}}
PATTERNS = [pattern for name in MAY_IMPORT for pattern in (f"{name}.py", f"{name}/**/*.py")]
FILES = sorted(file for pattern in PATTERNS for file in ROOT.glob(pattern))
MODULES = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in FILES}


@functools.cache
def code(file: Path) -> ast.Module:
    """Without docstrings."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    return tree


@functools.cache
def imports(module: str) -> set[str]:
    """All modules that a file imports, also inside functions and under TYPE_CHECKING."""
    targets = set()
    for node in ast.walk(code(MODULES[module])):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            targets |= {full if full in MODULES else node.module for full in names.values()}
    return targets


def violations(forbidden) -> list[str]:
    """The imports "module -> target" for which `forbidden(module, target)`."""
    return [f"{m} -> {target}" for m in MODULES for target in sorted(imports(m)) if forbidden(m, target)]


def package(module: str) -> str:
    return module.partition(".")[0]


def test_packages_import_one_way():
    forbidden = {name: MAY_IMPORT.keys() - allowed - {name} for name, allowed in MAY_IMPORT.items()}
    assert violations(lambda module, target: package(target) in forbidden[package(module)]) == []


def test_architectures_need_torch_and_pydantic_alone():
    def forbidden(module, target):
        allowed = {"archs", "torch", "pydantic", *sys.stdlib_module_names}
        allowed |= {"triton"} if module.startswith("archs.kernels.") else set()
        return package(module) == "archs" and package(target) not in allowed

    assert violations(forbidden) == []


def test_operators_alone_import_kernels():
    may = "archs.ops", "archs.kernels", "bench.tiles", "bench.chips"  # which tune and compile them
    assert violations(lambda module, target: target.startswith("archs.kernels") and not module.startswith(may)) == []


def test_no_files_import_each_other_in_a_circle():
    graph = {module: (imports(module) & MODULES.keys()) - {module} for module in MODULES}
    assert [*graphlib.TopologicalSorter(graph).static_order()]  # CycleError names the circle


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_named_in_its_file_and_in_the_registry_alone(variant):
    cls = VARIANTS[variant]
    named = re.compile(rf"\b{cls.__name__}\b|[\"']{variant}[\"']")
    places = [m for m in MODULES if package(m) != "bench" and named.search(ast.unparse(code(MODULES[m])))]
    assert sorted(places) == ["archs", cls.__module__]


def test_models_ask_for_no_device_and_no_compiler():
    predicates = re.compile(r"\b(?:is_cuda|is_cpu|is_compiling|compiler\(|usable\(|supports\()")
    models = [m for m, file in MODULES.items() if file.parent == ROOT / "archs" and m != "archs.ops"]
    assert {m: names for m in models if (names := predicates.findall(ast.unparse(code(MODULES[m]))))} == {}


def test_no_file_is_longer_than_400_lines():
    lengths = {module: len(file.read_text().splitlines()) for module, file in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > 400} == {}


def test_models_do_without_torchs_compiler_and_mark_constants_as_it_does():
    """It takes a second to import."""
    code = "import sys, archs, archs.techniques; assert 'torch._dynamo' not in sys.modules, 'torch._dynamo is imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs, ours = torch.compiler.assume_constant_result(lambda: 1), constant(lambda: 1)
    assert vars(theirs) == vars(ours)

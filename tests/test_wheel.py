"""The project as a wheel, in an empty folder: one package, which trains a study with an attention of the user's own."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from texts import MINIATURE
from yaml import safe_dump

from train.store import STUDIES

STUDY = MINIATURE | {
    "variants": [{"arch": "mha"}, {"arch": "mine.py:Mine"}],
    "train": {"tokens": 640, "batch_tokens": 64, "val_tokens": 64, "val_points": 1, "precision": "fp32"},
    "eval": {"loss_tokens": 64, "decode": {"batch": [1], "context": [8]}},
}
MINE = "from archs.grouped import MQA\n\n\nclass Mine(MQA):\n    pass\n"
SCRIPT = """
import sys
import train  # the user's own
import kvfrontier
from kvfrontier.archs import build
from kvfrontier.plots import load
assert train.mine and not hasattr(train, "plan")
assert "archs" not in sys.modules and "eval" not in sys.modules
print(build("gqa", vocab_size=8, width=8, layers=1, heads=2, context=8, kv_heads=1).count_params())
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the wheel's content, as pip installs it."""
    source, site = tmp_path_factory.mktemp("source") / "kvfrontier", tmp_path_factory.mktemp("site")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "results", "tests", "bench")
    shutil.copytree(STUDIES.parent, source, ignore=ignored)
    build = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    made = subprocess.run([sys.executable, "-c", build, site], cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = site.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    wheel.unlink()
    return site


def run(site, folder, *arguments):
    """A process that finds the wheel's package and not this checkout."""
    env = os.environ | {"PYTHONPATH": str(site), "KVFRONTIER_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_has_one_package_and_everything_in_it(site):
    (metadata,) = site.glob("*.dist-info")
    assert sorted(path.name for path in site.iterdir()) == ["kvfrontier", metadata.name]
    for name in ("studies/quick.yaml", "studies/low_rank.py", "plots/report.html.j2", "archs/kernels/cpu"):
        assert (site / "kvfrontier" / name).exists()
    assert "kvfrontier = kvfrontier:main" in (metadata / "entry_points.txt").read_text()


def test_an_installed_wheel_runs_a_study_in_an_empty_folder(site, tmp_path):
    (tmp_path / "texts").mkdir()
    for n in range(8):
        (tmp_path / "texts" / f"{n}.txt").write_text(f"the cat number {n} sat down on the mat\n" * 200)
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "study.yaml").write_text(safe_dump(STUDY | {"corpus": {"files": ["texts/*.txt"]}}))
    out = run(site, tmp_path, "-m", "kvfrontier", "run", "study.yaml", "--out", "out", "--workers", "2")
    assert "Mine" in out
    assert (tmp_path / "out" / "report.html").exists()
    assert "kvfrontier" in run(site, tmp_path, "-m", "kvfrontier", "--version")


def test_its_names_hide_nobodys_and_are_hidden_by_nobodys(site, tmp_path):
    (tmp_path / "train.py").write_text("mine = True\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); runpy.run_path('script.py')"
    assert run(site, tmp_path, "-c", command).strip().isdecimal()


def test_a_checkout_has_both_names_for_one_module():
    import kvfrontier.archs.mla as same
    from kvfrontier.archs import build

    import archs.mla

    assert same is archs.mla
    assert build is archs.build
    assert archs.mla.__spec__.name == "archs.mla"

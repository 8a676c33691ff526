"""Builds the wheel, in which the packages are inside of one, `kvfrontier`: top-level packages called `train` or `eval`
would collide with other people's. A checkout is used as it is (`from archs import build`); where it is installed write
`from kvfrontier.archs import build`, which works in a checkout, too. All else is in pyproject.toml."""

import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PACKAGES = "archs", "eval", "plots", "train"
IMPORT = re.compile(rf"^(\s*from )(?=({'|'.join(PACKAGES)})\b)", re.M)
MAIN = "import sys\n\nfrom kvfrontier import main\n\nsys.exit(main())\n"


class OnePackage(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        built, whole = Path(self.build_lib), Path(self.build_lib) / "kvfrontier"
        shutil.rmtree(whole, ignore_errors=True)  # of an earlier build
        whole.mkdir()
        (built / "kvfrontier.py").rename(whole / "__init__.py")
        for name in PACKAGES:
            (built / name).rename(whole / name)
        shutil.copytree("studies", whole / "studies", ignore=shutil.ignore_patterns("__pycache__"))
        for path in whole.rglob("*.py"):
            if path.parent.name != "studies":  # these run in a checkout, too
                path.write_text(IMPORT.sub(r"\1kvfrontier.", path.read_text(encoding="utf-8")), encoding="utf-8")
        (whole / "__main__.py").write_text(MAIN, encoding="utf-8")


setup(cmdclass={"build_py": OnePackage})

"""The figures: each is a file in this folder that defines FIGURE. How a measured quantity is drawn, said and tabled
stands in its file alone: a new one is a new file here."""

import importlib
import pkgutil

from plots.drawing import Drawing


def scan() -> dict[str, Drawing]:
    """Name -> figure, in the report's order."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    return {each.name: each for each in sorted((module.FIGURE for module in modules), key=lambda each: each.order)}


FIGURES = scan()

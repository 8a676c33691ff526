"""The figures. Each is a file in this folder that defines FIGURE and holds everything about one measured quantity: how
it is drawn, described and put into tables. A new figure is a new file here."""

import importlib
import pkgutil

from plots.drawing import Drawing


def scan() -> dict[str, Drawing]:
    """Name -> figure, in the report's order."""
    modules = [importlib.import_module(f"{__name__}.{file.name}") for file in pkgutil.iter_modules(__path__)]
    return {each.name: each for each in sorted((module.FIGURE for module in modules), key=lambda each: each.order)}


FIGURES = scan()

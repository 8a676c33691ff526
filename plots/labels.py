"""Names written beside points, where they touch nothing."""

import math
from itertools import pairwise, product
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

# Where a name may stand: right of its point, above it to the right, ...
SIDES = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (0, -1), (1, -1), (-1, -1))
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # no line strikes a name out


class Point(NamedTuple):
    """A point in data coordinates, with the ends of its vertical bar (None: no bar) and its name (empty: no label)."""

    x: float
    y: float
    low: float | None
    high: float | None
    name: str


def label_points(
    ax: Axes, points: list[Point], lines: list, need_all: bool = False, may_cross: bool = True, distances=(6, 9, 13)
) -> bool:
    """Write the points' names at one of the `distances` (in points of 1/72 inch), each nearer to its own point than to
    any other, inside the axes, touching no other name, marker or bar, and crossing as few `lines` as possible (none
    unless it `may_cross`). A name without room is left out, or, if the caller needs all, ends the work: returns False.
    """
    point = ax.figure.dpi / 72  # in pixels
    inside = ax.get_window_extent().padded(-point)
    taken, centers = [], ax.transData.transform([(each.x, each.y) for each in points])
    for each in points:
        heights = [each.y, *(each.y if end is None else end for end in (each.low, each.high))]
        (x, y), (_, low), (_, high) = ax.transData.transform([(each.x, height) for height in heights])
        taken.append(Bbox.from_extents(x - 4 * point, y - 4 * point, x + 4 * point, y + 4 * point))
        taken.append(Bbox.from_extents(x - point, low, x + point, high))
    drawn = [ax.transData.transform(line) for line in lines]
    for each in sorted((each for each in points if each.name), key=lambda each: -len(each.name)):
        at = each.x, each.y
        text = ax.annotate(each.name, at, (0, 0), textcoords="offset points", fontsize=7.5, bbox=PAPER)
        text.set_in_layout(False)
        choices = []
        for distance, (dx, dy) in product(distances, SIDES):
            reach = distance * (0.75 if dx and dy else 1.0)
            spot = {"position": (dx * reach, dy * reach), "ha": ("center", "left", "right")[dx]}
            spot["va"] = ("center_baseline", "bottom", "top")[dy]
            text.set(**spot)
            box = text.get_window_extent().padded(0.8 * point)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            is_free = within and not any(box.overlaps(other) for other in taken)
            if is_free and is_nearest(box, ax.transData.transform(at), centers):
                crossed = sum(crosses(box, line) for line in drawn)
                if may_cross or not crossed:
                    # Crossing a line costs more than standing far from the point.
                    choices.append((crossed + distance / 6, len(choices), spot, box))
        if choices:
            *_, spot, box = min(choices, key=lambda choice: choice[:2])
            text.set(**spot)
            taken.append(box)
        else:
            text.remove()
            if need_all:
                return False
    return True


def is_nearest(box: Bbox, center, centers) -> bool:
    """True if the box is nearer to its point's `center` than to all other `centers`, except those in the same place."""
    away = lambda x, y: math.hypot(max(box.x0 - x, x - box.x1, 0), max(box.y0 - y, y - box.y1, 0))  # noqa: E731
    return all(away(*center) < away(*other) or math.dist(center, other) < 1 for other in centers)


def crosses(box: Bbox, line) -> bool:
    """True if a line of pixels passes through the box; it is sampled, which is exact enough for text."""
    for (x0, y0), (x1, y1) in pairwise(line):
        steps = max(2, int(max(abs(x1 - x0), abs(y1 - y0)) / 4))
        if any(box.contains(x0 + (x1 - x0) * i / steps, y0 + (y1 - y0) * i / steps) for i in range(steps + 1)):
            return True
    return False

"""The look of all figures: page sizes, palette, ticks, legends and reproducible files.

Colours follow Okabe and Ito's idea (colour-blind readers can distinguish them), and the first five also differ by at
least 10 in CIE lightness, so that they stay distinct in grey. Lengths are in inches, text sizes in points."""

import contextlib
import importlib
import io
import math
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

PAGES = {"": 3.35, "_wide": 6.9}  # file suffix -> width: one column and two columns of a two-column paper
PALETTE = ("#111111", "#0b4a9e", "#bf3a1b", "#33b38f", "#edb120", "#a45bb0", "#79c3ec", "#7d7d7d")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # 7 markers and 8 colours: a pair repeats only after 56 architectures
FILLS = ("full", "left", "top", "right", "bottom")
LINES = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
GREY = "#666666"
UNDATED = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {"Software": None}}  # the same file each time
BACKENDS = {"svg": "svg", "pdf": "pdf", "png": "agg", "pgf": "pgf", "eps": "ps"}
PNG_DPI = 300

RC = {
    "font.family": ["STIXGeneral", "DejaVu Sans"],  # both come with matplotlib: the same figure on every machine
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "legend.borderaxespad": 0.2,
    "legend.borderpad": 0.2,
    "axes.linewidth": 0.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.4,
    "xtick.major.width": 0.5,
    "ytick.major.width": 0.5,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.1,
    "lines.markersize": 4,
    "lines.markeredgewidth": 0.8,
    "text.parse_math": False,  # a `$` in a user's label is a dollar sign
    "axes.unicode_minus": True,
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "kvfrontier",
    "figure.dpi": 100,
}


@dataclass(frozen=True)
class Look:
    """Each architecture has a colour and a marker; its variants differ in fill and line style."""

    color: str
    marker: str
    fill: str
    line: str | tuple

    @classmethod
    def of(cls, arch: int, sibling: int) -> "Look":
        line = LINES[(arch // len(PALETTE) + sibling) % len(LINES)]
        return cls(PALETTE[arch % len(PALETTE)], MARKERS[arch % len(MARKERS)], FILLS[sibling % len(FILLS)], line)

    def marks(self, hollow: bool = False) -> dict:
        return {
            "color": self.color,
            "marker": self.marker,
            "fillstyle": "full" if hollow else self.fill,
            "markerfacecolor": "white" if hollow else self.color,
            "markerfacecoloralt": "white",
            "markeredgecolor": self.color,
        }

    def handle(self) -> Line2D:
        return Line2D([], [], linestyle=self.line, **self.marks())


def fixed_size() -> tuple[float, float] | None:
    """The size in inches that all figures are to have, where matplotlib's `figure.figsize` is set; else each has the
    height that its content needs."""
    size = tuple(matplotlib.rcParams["figure.figsize"])
    return size if size != tuple(matplotlib.rcParamsDefault["figure.figsize"]) else None


def wrapped(label: str, width: int = 28) -> str:
    """A label on at most two lines. A longer one keeps its beginning and its end; the tables hold it in full."""
    lines = textwrap.wrap(label, width) or [label[:width]]
    return "\n".join(lines if len(lines) < 3 else (lines[0], f"… {label[2 - width :].lstrip(' -_')}"))


def bytes_text(count: float) -> str:
    """Readable bytes: 512 B, 1.5 KiB, 24 MiB."""
    power = min(int(math.log2(count) // 10), 5) if count >= 1 else 0
    return f"{count / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB')[power]}"


def tokens_text(count: float) -> str:
    """Readable context lengths: 256, 4K, 1M in powers of 1024; other numbers as they are."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if count >= unit and count % unit == 0:
            return f"{count // unit:.0f}{name}"
    return f"{count:g}"


def plain_text(value: float, digits: int = 4) -> str:
    """A readable number: 0.05, 3, 250, 12k, 1.5M in powers of 1000."""
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= unit:
            return f"{value / (unit if unit != 1e4 else 1e3):.{digits}g}{name}"
    return f"{value:.{digits}g}"


def set_ticks(axis, places, text) -> None:
    axis.set_major_locator(FixedLocator(list(places)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: text(value))


def octave_ticks(axis, candidates, text, inches: float, gap: float) -> None:
    """Set ticks at every n-th of `candidates` on a log axis that is `inches` long, at least `gap` inches apart."""
    low, high = (math.log2(limit) for limit in axis.get_view_interval())
    places = sorted(candidates)
    for step in range(1, len(places) + 1):
        chosen = places[::step]
        if all(math.log2(b / a) / (high - low) * inches >= gap for a, b in pairwise(chosen)):
            break
    set_ticks(axis, chosen, text)


def measured_ticks(axis, values, text, inches: float, gap: float) -> None:
    """Set ticks at the measured values on a log axis; an axis with one value gets an octave on either side."""
    values = sorted(set(values))
    if len(values) == 1:
        axis.set_view_interval(values[0] / 2, values[0] * 2, ignore=True)
    octave_ticks(axis, values, text, inches, gap)


def powers_of_two(low: float, high: float) -> list[int | float]:
    return [2**power for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]


def decimal_ticks(axis, text=plain_text, at_most: int = 6) -> None:
    """Set ticks on a log axis at 1, 10, 100, or at 1, 2, 5, 10, or evenly: whichever fills the axis without crowding
    it."""
    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        places = [digit * 10.0**power for power in decades for digit in digits if low <= digit * 10.0**power <= high]
        if len(places) <= at_most:
            break
    if len(places) < 3 and high < 10 * low:
        places = [
            place
            for place in MaxNLocator(at_most - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
            if low <= place <= high and place > 0
        ]
    set_ticks(axis, places, text)


def add_legend(fig: Figure, entries: list[tuple[Line2D, str]], title: str = "") -> None:
    """Add a legend under the axes, where it covers no data, in as many columns as fit; the figure grows by its
    height."""
    handles, labels = zip(*entries, strict=True)
    room = fig.get_figwidth() * fig.dpi * 0.98
    how = {"title": title, "title_fontsize": RC["legend.fontsize"], "alignment": "left"}
    for rows in range(1, len(entries) + 1):
        columns = math.ceil(len(entries) / rows)
        legend = fig.legend(handles, labels, loc="outside lower center", ncols=columns, **how)
        box = legend.get_window_extent()
        if box.width <= room or rows == len(entries):
            break
        legend.remove()
    if not fixed_size():
        fig.set_figheight(fig.get_figheight() + box.height / fig.dpi)


@contextlib.contextmanager
def _for_tex() -> Iterator[None]:
    """Texts are measured by the TeX that is there, in the document's fonts."""
    tex = next(filter(shutil.which, ("xelatex", "lualatex", "pdflatex")), "xelatex")
    try:
        with matplotlib.rc_context({"pgf.rcfonts": False, "pgf.texsystem": tex}):
            yield
    except (OSError, RuntimeError):
        raise
    except Exception as e:  # of matplotlib's: LatexError, ValueError
        text = str(e).splitlines()[0].rpartition("}")[0].rpartition("}")[2] or str(e).splitlines()[0]
        why = "its package pgf is missing, or a label has one of _ & # $ (rename it with --labels)"
        raise RuntimeError(f"TeX cannot set {text!r}: {why}") from None


def render(fig: Figure, kinds: Sequence[str] = ("svg", "pdf", "png")) -> dict[str, bytes]:
    """The figure as the bytes of files of these kinds. It is laid out once, so that all agree, and contains no dates or
    versions, so that the same figure gives the same bytes. A pgf has the fonts of the document that takes it.
    RuntimeError for pgf where no TeX is installed, or where it cannot read a label."""
    if layout := fig.get_layout_engine():
        layout.execute(fig)
        fig.set_layout_engine("none")
    files, dpi = {}, fig.dpi
    for kind in kinds:
        buffer = io.BytesIO()
        fig.dpi = PNG_DPI if kind == "png" else 72
        canvas = importlib.import_module(f"matplotlib.backends.backend_{BACKENDS[kind]}").FigureCanvas(fig)
        how = {"metadata": UNDATED[kind]} if kind in UNDATED else {}
        with _for_tex() if kind == "pgf" else contextlib.nullcontext():
            getattr(canvas, f"print_{kind}")(buffer, **how)  # savefig would draw everything twice
        fig.dpi, files[kind] = dpi, buffer.getvalue()
    if "svg" in files:  # a hundredth of a point is enough for places; scales are below 1 and stay as they are
        files["svg"] = re.sub(rb"\b([1-9]\d*\.\d\d)\d+", rb"\1", files["svg"])
    return files

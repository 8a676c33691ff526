"""Figures, tables and the report of one study, drawn from its `results.json` alone: they can be drawn again at any
time, on any machine, without the models that were measured.

    from plots import frontier, load

    fig, rows = frontier(load("runs/quick", labels={"gqa": "ours"}), size=(3.3, 2.2))

Each figure of FIGURES is such a function: it gives a matplotlib Figure, and its numbers as a list of dicts.
"""

import csv
import io
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from plots import report, style, tables
from plots.drawing import NotInResults
from plots.figures import FIGURES
from plots.results import Results, ResultsError, load

__all__ = ["FIGURES", "ResultsError", "draw", "draw_for_paper", "figure", "is_drawn", "load", *FIGURES]


def is_drawn(directory: Path) -> bool:
    """True if the report, which is written last, is newer than results.json and all figures and tables."""
    folders = [directory / name for name in ("figures", "tables")]
    if not all(path.exists() for path in (directory / "report.html", *folders)):
        return False
    drawn = (directory / "report.html").stat().st_mtime_ns
    others = [directory / "results.json", *(path for folder in folders for path in folder.iterdir())]
    return all(path.stat().st_mtime_ns <= drawn for path in others)


def draw(directory: Path) -> list[Path]:
    """Write figures/, tables/, report.html and the TensorBoard run study/ next to `directory`/results.json.

    Returns the files written. Raises ResultsError, with a message of one line, for a results file that cannot be
    drawn."""
    directory = Path(directory)
    results = load(directory)
    written: list[Path] = []

    def write(name: str, content: bytes | str) -> None:
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f"{path.name}.tmp")  # renamed when complete, so that no reader sees half a file
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        written.append(path)

    drawn, left_out, images = [], {}, {}
    with matplotlib.rc_context(matplotlib.rcParamsDefault | style.RC):
        for name, figure in FIGURES.items():
            try:
                rows = figure.rows(results)
            except NotInResults as why:
                left_out[name] = str(why)
                continue
            svg = {}
            for suffix, width in style.PAGES.items():
                fig = figure.draw(rows, results, width)
                files = style.render(fig)
                svg[suffix], images[name] = files.pop("svg"), files["png"]  # the wide one comes last
                for kind, content in files.items():
                    write(f"figures/{name}{suffix}.{kind}", content)
            write(f"figures/{name}.csv", _csv(rows))
            caption = figure.caption(results, rows)
            drawn.append(
                {"name": name, "title": figure.title, "caption": caption, "rows": rows, "column": svg[""]}
                | {"wide": svg["_wide"]}
            )

    short = [tables.results_table(results), tables.comparison_table(results), tables.harness_table(results)]
    short += [table(results) for figure in FIGURES.values() for table in figure.tables]
    short = [table for table in short if table]
    text = tables.to_markdown(*short)
    write("tables/results.md", text)
    write("tables/results.tex", tables.to_latex(*short))
    all_long = []
    for name, figure in FIGURES.items():
        long = figure.long_tables(results)
        for kind, rendered in (("md", tables.to_markdown), ("tex", tables.to_latex)):
            if long:
                write(f"tables/{name}.{kind}", rendered(*long))
            else:
                (directory / "tables" / f"{name}.{kind}").unlink(missing_ok=True)
        all_long += long
    matching = tables.matching_tables(results)
    write("tables/matching.md", tables.to_markdown(*matching))
    write("tables/findings.md", report.sentences_as_markdown(results))
    for name in left_out:  # an old figure of data that the results no longer contain
        for old in directory.glob(f"figures/{name}*"):
            if old.name.split(".")[0] in {name + suffix for suffix in style.PAGES}:
                old.unlink(missing_ok=True)
    written.append(_tensorboard(directory / "study", images, text))
    page = report.page(results, drawn, left_out, [*short, *all_long, *matching])
    write("report.html", page)  # last: where it exists, everything else was written
    return written


def figure(
    name: str, results: Results, size: tuple[float, float] | None = None, look: Any = ()
) -> tuple[Figure, list[dict]]:
    """The figure of that name and the rows that it shows, as plots/figures draws it. `size`: width and height in
    inches; without it two columns wide. `look`: matplotlib styles, as names, files or dicts, over our own and over what
    your matplotlibrc or program has set. NotInResults says why the results have no such figure."""
    rows = FIGURES[name].rows(results)
    with matplotlib.rc_context(_look(size, look)):
        fig = FIGURES[name].draw(rows, results, size[0] if size else style.PAGES["_wide"])
    for ax in fig.axes:  # in our own texts a `$` is a dollar sign; ticks on an axis that is changed later may have math
        for axis in (ax.xaxis, ax.yaxis):
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                tick.label1.set_parse_math(not isinstance(axis.get_major_formatter(), FixedFormatter))
    return fig, rows


def _look(size: tuple[float, float] | None, look: Any) -> dict[str, Any]:
    default = matplotlib.rcParamsDefault
    with matplotlib.rc_context():
        own = {key: value for key, value in matplotlib.rcParams.items() if key not in default or value != default[key]}
        matplotlib.rcdefaults()
        matplotlib.style.use([style.RC, own, *([look] if isinstance(look, str | Path | dict) else look)])
        if size:
            matplotlib.rcParams["figure.figsize"] = size
        return dict(matplotlib.rcParams)


def __getattr__(name: str) -> Any:
    if name in FIGURES:
        return partial(figure, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def draw_for_paper(
    results: Results, names: Sequence[str], folder: Path, kinds: Sequence[str], size=None, look: Any = ()
) -> list[Path]:
    """Writes these figures, or all that the results have if none is named, and their CSV to `folder`, and returns the
    files; see `figure`. ResultsError if the results have no such figure or it cannot be written in that form."""
    written = []
    for name in names or FIGURES:
        try:
            fig, rows = figure(name, results, size, look)
            files = style.render(fig, kinds) | {"csv": _csv(rows).encode()}
        except NotInResults as why:
            if names:
                raise ResultsError(f"{name}: {why}") from None
            continue
        except (OSError, RuntimeError) as why:  # an unknown style; of pgf, no TeX or a label that it cannot read
            raise ResultsError(f"{name}: {str(why).splitlines()[0]}") from None
        folder.mkdir(parents=True, exist_ok=True)
        for kind, content in files.items():
            written.append(folder / f"{name}.{kind}")
            written[-1].write_bytes(content)
    return written


def _csv(rows: list[dict]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _tensorboard(folder: Path, images: dict[str, bytes], text: str) -> Path:
    """Write a TensorBoard run for the whole study, next to the training runs: figures as PNG and tables as text."""
    before = [path for path in folder.glob("events.out.tfevents*") if path.suffix != ".final"]  # which `eval` writes
    writer = EventFileWriter(str(folder))
    for name, png in images.items():
        width, height = (int.from_bytes(png[at : at + 4]) for at in (16, 20))
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        summary = Summary(value=[Summary.Value(tag=f"figures/{name}", image=image)])
        writer.add_event(Event(wall_time=time.time(), summary=summary))
    writer.add_event(Event(wall_time=time.time(), summary=text_pb("results/text_summary", text)))
    writer.close()
    for old in before:
        old.unlink(missing_ok=True)
    return next(path for path in folder.glob("events.out.tfevents*") if path.suffix != ".final")

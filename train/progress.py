"""One progress display for a whole study: which run, how far, and the time left.

A bar on a terminal; elsewhere (a log file, CI) a line now and then.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 15
console = Console(stderr=True, highlight=False)


class StudyProgress:
    """Use as a context around one stage. `total` is the work of the stage in any unit; what is left is timed by it."""

    def __init__(self, stage: str, total: float):
        self.stage, self.total, self.done = stage, total, 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %  {task.fields[detail]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task(stage, total=total, detail="")

    def __enter__(self) -> "StudyProgress":
        self._started = self._shown = time.monotonic()
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def left(self, work: float) -> None:
        """How much there is still to do, where that was not known before."""
        self.total = self.done + work

    def skip(self, work: float) -> None:
        """Work that need not be done (any more)."""
        self.total -= work

    def show(self, run: str, detail: str, work: float) -> None:
        """`work` is what has been done in this run and was not shown before."""
        self.done += work
        now = time.monotonic()
        left = (self.total - self.done) * (now - self._started) / self.done if self.done else 0
        detail = f"{detail}  {duration(left)} left" if self.done else detail
        if console.is_terminal:
            self._bar.update(
                self._task, description=f"{self.stage} {run}", completed=self.done, total=self.total, detail=detail
            )
        elif now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            self.say(f"{self.stage} {run}: {detail}")

    def say(self, line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""One progress display for a whole study: a bar on a terminal, elsewhere (a log file, CI) a line now and then."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

SECONDS_BETWEEN_LINES = 15
console = Console(stderr=True, highlight=False)


class StudyProgress:
    """A context around one stage. `total` is its work, in any unit; `note` is shown before the run."""

    def __init__(self, stage: str, total: float):
        self.stage, self.total, self.done = stage, total, 0.0
        self.note = ""
        name, done = map(TextColumn, ("{task.description}", "{task.percentage:3.0f} %  {task.fields[detail]}"))
        self._bar = Progress(name, BarColumn(bar_width=24), done, console=console, transient=True)
        self._task = self._bar.add_task(stage, total=total, detail="")

    def __enter__(self) -> "StudyProgress":
        self._started = self._shown = time.monotonic()
        if console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if console.is_terminal:
            self._bar.stop()

    def set_left(self, work: float) -> None:
        """Sets how much work there is still to do."""
        self.total = self.done + work

    def skip(self, work: float) -> None:
        """Takes off work that need not be done."""
        self.total -= work

    def show(self, run: str, detail: str, work: float) -> None:
        """Shows the run and a detail; `work` is the work done since the last call."""
        self.done += work
        now = time.monotonic()
        left = (self.total - self.done) * (now - self._started) / self.done if self.done else 0
        detail = f"{detail}  {duration(left)} left" if self.done else detail
        where = " ".join(filter(None, (self.stage, self.note, run)))
        if console.is_terminal:
            self._bar.update(self._task, description=where, completed=self.done, total=self.total, detail=detail)
        elif now - self._shown >= SECONDS_BETWEEN_LINES:
            self._shown = now
            self.say(f"{where}: {detail}")

    def say(self, line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

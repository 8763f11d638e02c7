"""What the demo shows: progress on standard error (a bar at a terminal, lines elsewhere) and the summary at the end."""

import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, TypeAlias

from control.cli_base import click, say, show

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_LINE_SECONDS: Final = 2.0

Line: TypeAlias = tuple[str, object, str]  # name, value, remark


class Progress:
    """Counts of one campaign, shown as they move. A context manager; at a terminal it owns the last line meanwhile."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: object = None
        self._last_line = 0.0
        self._last_text = ""

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(TextColumn("sending"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[counts]}"),
                                 TimeElapsedColumn(), console=Console(stderr=True), transient=True)  # fmt: skip
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, recipients: int, ended: int, counts: str) -> None:
        """Show that `ended` of `recipients` have their end; `counts` is a short text beside it."""
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=recipients or None, counts=counts)
            self._bar.update(self._task, total=recipients or None, completed=ended, counts=counts)  # type: ignore[arg-type]
            return
        text = f"sending: {ended:,} of {recipients:,} recipients done; {counts}" if recipients else "preparing the recipients"
        if text != self._last_text and time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line, self._last_text = time.monotonic(), text
            say(text)


def summary(lines: Iterable[Line]) -> None:
    """Name, value, remark: one line each on standard output. Without a name: a count that belongs to the line above; all empty: a gap."""
    for name, value, remark in lines:
        if not (name or remark):
            click.echo()
        elif not name:
            click.echo(f"    {show(value):>6}  {show(remark)}")
        elif isinstance(value, str) and not remark:
            click.echo(f"{name:<16}{value}")
        else:
            click.echo(f"{name:<16}{show(value):>10}{'   ' + show(remark) if remark else ''}")

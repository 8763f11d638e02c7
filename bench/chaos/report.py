"""What the harness says: progress and a table for people on standard error, the results as JSON on standard output.

`python -m bench.chaos.report FILE ...` makes one Markdown table by groups of what `--json` printed into these files.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.chaos.catalogue import FAULTS, GROUPS
from bench.chaos.fault import CannotRun, Fault
from bench.chaos.runner import Result, Run, summed

_console = Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 200)


def say(sentence: str, style: str = "") -> None:
    """One line for people."""
    _console.print(Text(sentence, style=style))


def line(run: Run, number: int, of: int) -> None:
    """One run, as soon as it is over."""
    verdict = run.verdict
    counts = (
        f"lost {verdict.lost}, false {verdict.false_delivered}/{verdict.false_bounced}, "
        f"duplicates {verdict.duplicates_announced} announced {verdict.duplicates_unexplained} unexplained"
    )
    state = "BROKEN" if run.broken else "ok"
    say(
        f"[{number}/{of}] {run.fault} seed {run.seed}: {state}; {verdict.recipients:,} recipients at {run.rate:,.0f}/s, {counts}; "
        f"healed {run.heal_seconds:.1f} s, run {run.seconds:.1f} s",
        "bold red" if run.broken else "green",
    )
    for sentence in run.broken:
        say(f"    {sentence}", "red")
    for sentence in run.notes:
        say(f"    {sentence}", "dim")


def table(runs: Sequence[Run], cannot: Iterable[CannotRun]) -> None:
    """All results, and what was not played."""
    made = Table(title="Promises under faults", title_justify="left")
    made.add_column("fault")
    columns = ("runs", "recipients", "lost", "false d", "false b", "announced", "unexplained", "healed s")
    for column in columns:
        made.add_column(column, justify="right")
    made.add_column("verdict")
    broken = {run.fault for run in runs if run.broken}
    for result in summed(runs):
        made.add_row(
            result.fault, f"{result.runs:,}", f"{result.recipients:,}", f"{result.lost:,}", f"{result.false_delivered:,}",
            f"{result.false_bounced:,}", f"{result.duplicates_announced:,}", f"{result.duplicates_unexplained:,}",
            f"{result.heal_seconds:.1f}", Text("BROKEN", style="bold red") if result.fault in broken else Text("kept", style="green"),
        )  # fmt: skip
    _console.print(made)
    for entry in cannot:
        say(f"not played: row {entry.row}, {entry.name}: {entry.reason}", "yellow")
    for run in runs:
        if run.broken:
            say(f"again: sluice chaos --fault {run.fault} --seed {run.seed}", "bold")


def catalogue(faults: Sequence[Fault], cannot: Sequence[CannotRun]) -> None:
    """Every fault by name, for --list."""
    made = Table(title="Faults", title_justify="left")
    for column in ("row", "name", "what happens", "second copies", "needs"):
        made.add_column(column)
    words = {"none": "none", "window": "what the killed had in doubt", "named": "each named by a `u`"}
    for fault in sorted(faults, key=lambda one: one.row):
        made.add_row(str(fault.row), fault.name, fault.about, words[fault.duplicates], ", ".join(sorted(fault.needs)))
    _console.print(made)
    for entry in cannot:
        say(f"not played: row {entry.row}, {entry.name}: {entry.reason}", "yellow")


def markdown(results: Sequence[Result]) -> str:
    """A table with one line per group of faults, and one for each storm."""
    rows = {fault.name: fault.row for fault in FAULTS}
    told: dict[str, list[Result]] = {name: [] for name, _ in GROUPS}
    for result in results:
        name = next((name for name, of in GROUPS if rows.get(result.fault) in of), result.fault)
        told.setdefault(name, []).append(result)
    lines = [
        "| faults | runs | recipients | lost | false | second copies, each with its `u` | unexplained | healed after, longest |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, group in told.items():
        if group:
            false = sum(one.false_delivered + one.false_bounced for one in group)
            lines.append(
                f"| {name} ({len(group)}) | {sum(one.runs for one in group):,} | {sum(one.recipients for one in group):,} | "
                f"{sum(one.lost for one in group):,} | {false:,} | {sum(one.duplicates_announced for one in group):,} | "
                f"{sum(one.duplicates_unexplained for one in group):,} | {max(one.heal_seconds for one in group):.1f} s |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown([result for name in sys.argv[1:] for result in msgspec.json.decode(Path(name).read_bytes(), type=list[Result])]))

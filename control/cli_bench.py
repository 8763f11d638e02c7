"""`sluice bench`: measures this machine's Sluice beside other senders; the work is `python -m bench`."""

import os
import sys

from control.cli_base import EPILOG, click, config_path


@click.command("bench", epilog=EPILOG)
@click.option("--quick", is_flag=True, help="Under two minutes: the floor, smtp-source, the engine, and how reply delays are borne.")
@click.option("--runs", type=click.IntRange(1, 20), default=3, show_default=True, help="Runs of each case; the median is shown.")
@click.option("--only", default="", metavar="TEXT", help="Only rows whose name contains TEXT; `parts` for the parts alone.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object {machine, rows, goals} to standard output.")
def bench(quick: bool, runs: int, only: str, as_json: bool) -> None:
    """Measure how fast Sluice sends, beside other senders.

    One run reproduces every number of docs/performance.md as a ratio: a C floor, smtp-source, mail libraries (what is not installed
    is skipped, with the reason), and the engine end to end with everything on. Private stores and a sink on this machine; nothing
    leaves it. CPU that others use meanwhile is noticed and said.
    """
    from control import machine

    options = ["--runs", str(runs), *(["--quick"] if quick else []), *(["--only", only] if only else []), *(["--json"] if as_json else [])]
    os.execve(sys.executable, list(machine.python("bench", *options)), machine.environment(config_path()))


COMMANDS = (bench,)

"""`sluice journal`: looks into journals and hands those of dead engines to this node. The work is done by `python -m journal`."""

from pathlib import Path
from typing import Final

from control.cli_base import EPILOG, become, click, json_option


@click.group("journal", epilog=EPILOG)
def journal() -> None:
    """Look into journals, or hand a dead engine's to this node."""


@journal.command("show", epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--ledger", is_flag=True, help="Ask PostgreSQL as well how far it has read.")
@json_option
def show(directory: str, ledger: bool, as_json: bool) -> None:
    """Show what stands in a journal.

    Segments, records by kind, how far its readers are, messages whose content may have left and that have no outcome, and damage
    with file and offset. DIR is one journal or a directory of them. It only reads, and the owner may be writing. Exit code 1 when there
    is damage.
    """
    become("journal", "show", *(["--ledger"] if ledger else []), *(["--json"] if as_json else []), str(Path(directory).resolve()))


@journal.command("replay", epilog=EPILOG)
@click.argument("directory", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.option("--keep", is_flag=True, help="Leave the directory where it is. Without it, it is removed once everything is in the ledger.")
@json_option
def replay(directory: str, keep: bool, as_json: bool) -> None:
    """Hand the journal of a dead engine, or a whole dead node, to this node's ledger.

    Outcomes go into PostgreSQL, each once however often it is replayed; messages in doubt get their `u` records; its batches are
    released; its accounting lines go into this node's files. DIR is one journal or a directory of them. Refused while the owner
    lives. Engines do this by themselves with what dead engines left on their own node.
    """
    become("journal", "replay", *(["--keep"] if keep else []), *(["--json"] if as_json else []), str(Path(directory).resolve()))


COMMANDS: Final = (journal,)

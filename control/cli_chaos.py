"""`sluice chaos`: harm a fleet on purpose and count. The harness is a process of its own; this hands the options on."""

from typing import Final

from control.cli_base import become, click


@click.command("chaos", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def chaos(options: tuple[str, ...]) -> None:
    """Prove the delivery contract under faults.

    It builds a fleet of its own, kills and cuts things on purpose, and compares what was accepted with what was recorded
    (`sluice chaos --help`, docs/delivery-contract.md). Exit code 0 only if no promise was broken.
    """
    become("bench.chaos", *options)


COMMANDS: Final = (chaos,)

"""The `sluice` command: the root, and the commands that run, look at and check the processes of one machine.

It acts on the stores directly, with the authority of the local administrator, through the same functions as the API. It starts the
other processes as children and never imports them. The commands about campaigns, lists and so on are in `cli_campaign`, `cli_lists`,
`cli_servers` and `cli_status`; bodies import what they need, so `sluice --help` costs next to nothing.
"""

import os
import sys

from control import (
    cli_base,
    cli_bench,
    cli_bounces,
    cli_campaign,
    cli_chaos,
    cli_classify,
    cli_conversions,
    cli_dkim,
    cli_headers,
    cli_inbound,
    cli_journal,
    cli_lists,
    cli_messages,
    cli_preflight,
    cli_sent,
    cli_servers,
    cli_status,
    cli_suppress,
    cli_template,
)
from control.cli_base import EPILOG, FAILED, become, click, json_option, say


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EPILOG)
@click.option("--config", "config", envvar="SLUICE_CONFIG", metavar="FILE", type=click.Path(dir_okay=False),
              help="Settings file. Without it: SLUICE_CONFIG, else the defaults for one machine.")  # fmt: skip
@click.version_option(package_name="sluice", prog_name="sluice")
def cli(config: str | None) -> None:
    """Sluice sends bulk mail: campaigns go in, personalised and accounted messages come out.

    First steps: `sluice demo` shows everything at work; `sluice up` runs it; docs/getting-started.md leads to a first campaign.
    """


@cli.command(epilog=EPILOG)
@click.option("--recipients", "-n", type=click.IntRange(10, 10_000_000), default=10_000, show_default=True, help="Rows of its list.")
@click.option("--engines", type=click.IntRange(1, 256), help="Engine processes. Default: one per core.")
@click.option("--stay", is_flag=True, help="Keep everything running afterwards, until Ctrl-C: look around in console and mailbox.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON object to standard output at the end.")
def demo(recipients: int, engines: int | None, stay: bool, as_json: bool) -> None:
    """Show everything at work with a made-up campaign.

    Starts everything on free ports of this machine with data of its own, imports a list with the faults real lists have, sends a
    personalised newsletter and counts. Nothing leaves the machine. Exit code 0 only if the audit is clean and the sink has accepted
    exactly what was recorded as delivered.
    """
    from control import demo as demo_module

    sys.exit(demo_module.main(cli_base.config_path(), recipients=recipients, engines=engines, stay=stay, as_json=as_json))


@cli.command(epilog=EPILOG)
@click.option("--engines", type=click.IntRange(1, 256), help="Engine processes. Default: engine.processes of the settings.")
@click.option("--log-files", is_flag=True, help="Write the processes' logs to STATE/log/NAME.log instead of standard error.")
def up(engines: int | None, log_files: bool) -> None:
    """Run all processes of this machine, supervised.

    Until SIGTERM or Ctrl-C. Starts private PostgreSQL and Valkey unless the settings name servers, migrates the database, then runs
    the engines, the API (control) and what the world sends back (inbound). A process that dies is started again. Stopping drains
    the engines first.
    """
    from control import up as up_module

    sys.exit(up_module.main(cli_base.load_settings(), cli_base.config_path(), engines=engines, log_files=log_files))


@cli.command(epilog=EPILOG)
@click.option("--slot", type=click.IntRange(0, 255), default=0, show_default=True, help="Number of this engine on its node.")
def engine(slot: int) -> None:
    """Run one engine process in the foreground.

    A fleet runs one per core and node; `sluice up` does it for you.
    """
    become("engine", "--slot", str(slot))


@cli.command(epilog=EPILOG)
def control() -> None:
    """Run the API and the console in the foreground."""
    become("control")


@cli.command("sink", context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def sink(options: tuple[str, ...]) -> None:
    """Run the built-in mail sink.

    It takes everything, answers as scripted, and shows the mail (`sluice sink --help`).
    """
    become("bench.sink", *options)


@cli.command("check-config", epilog=EPILOG)
@click.argument("file", required=False, type=click.Path(dir_okay=False))
@json_option
def check_config(file: str | None, as_json: bool) -> None:
    """Check the settings.

    Reads them as every process would, and says what is wrong. Checks FILE, or the file the other commands would use, with the
    SLUICE_* variables of the environment on top. Exit code 1 when they are refused.
    """
    from pathlib import Path

    from config import load
    from domain.errors import ConfigurationError

    path = Path(file) if file else cli_base.config_path()
    try:
        settings, warnings = load.check(path, os.environ)
    except ConfigurationError as error:
        if as_json:
            cli_base.write_json({"ok": False, "file": str(path or ""), "problems": error.problems, "warnings": []})
        for problem in error.problems:
            say(f"sluice: {problem}")
        sys.exit(FAILED)
    if as_json:
        state = str(load.state_directory(settings))
        cli_base.write_json({"ok": True, "file": str(path or ""), "problems": [], "warnings": warnings, "state_directory": state})
        return
    for warning in warnings:
        say(f"warning: {warning}")
    cli_base.facts([
        ("settings", f"{path or 'defaults'}: ok"),
        ("state directory", load.state_directory(settings)),
        ("PostgreSQL", "embedded" if settings.database.url == "embedded:" else "as given"),
        ("Redis", "embedded" if settings.redis.url == "embedded:" else "as given"),
        ("API", f"http://{settings.control.host}:{settings.control.port}"),
    ])  # fmt: skip


@cli.command(epilog=EPILOG)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Write the completion script of a shell.

    bash: `sluice completion bash > /etc/bash_completion.d/sluice`; zsh and fish likewise, into a directory of their function path.
    """
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None  # the three names above are click's own
    click.echo(maker(cli, {}, "sluice", "_SLUICE_COMPLETE").source())


for module in (
    cli_lists, cli_servers, cli_campaign, cli_status, cli_journal, cli_bench, cli_chaos, cli_classify, cli_dkim, cli_template, cli_headers,
    cli_suppress, cli_bounces,
    cli_messages,
    cli_preflight,
    cli_conversions,
    cli_sent,
    cli_inbound,
):  # fmt: skip
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Entry point of the `sluice` script."""
    with cli_base.exit_codes():
        sys.exit(cli.main(prog_name="sluice", standalone_mode=False))


if __name__ == "__main__":
    main()

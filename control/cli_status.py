"""`sluice status`, `top` and `audit`: how it goes, live how it goes, and the proof of what came of it."""

import sys
import time
from typing import TYPE_CHECKING, Final

from control.cli_base import EPILOG, FAILED, OK, Stores, click, facts, json_option, number, say, show, table, with_stores, write_json

if TYPE_CHECKING:
    from rich.console import Group

    from store.acceptances import Against
    from store.accounting import Audit
    from store.status import Status

_SERVER_COLUMNS: Final = (">id", "delivery server", "state", ">msg/s", ">connections", ">in flight", ">queued batches", ">delivered",
                          ">bounced", ">deferrals", ">uncertain")  # fmt: skip
_ENGINE_COLUMNS: Final = ("engine", "state", ">msg/s", ">messages", ">CPU µs/message", ">peak MiB", ">batches held")
_INBOUND_COLUMNS: Final = ("inbound", ">opens and clicks", ">lost", ">KiB waiting on disk")
_CAMPAIGN_COLUMNS: Final = (">id", "campaign", "state", ">recipients", ">delivered", ">bounced", ">expired", ">suppressed", ">queued")


@click.command("status", epilog=EPILOG)
@json_option
def status_command(as_json: bool) -> None:
    """Show how it goes and what needs an operator.

    Stores, engines, delivery servers and unfinished campaigns. Exit code 1 when something does: a store that does not answer, no
    engine, a delivery server that is failing or suspended.
    """

    async def work(stores: Stores) -> "Status":
        from store import status

        return await status.gather(stores.pool, stores.redis)

    found = with_stores(work)
    if as_json:
        write_json(found)
    else:
        facts([("PostgreSQL", found.postgresql), ("Redis", found.redis)])
        for title, columns, rows in _tables(found):
            table(title, columns, rows)
        if found.received is not None:
            facts(
                [
                    ("received mail", f"{show(found.received.waiting)} waiting to be read"),
                    ("handled today", ", ".join(f"{show(count)} {outcome}" for outcome, count in found.received.today.items()) or "none"),
                ]
            )
        for sentence in found.trouble:
            say(f"trouble: {show(sentence)}")
    sys.exit(OK if found.ok else FAILED)


def _tables(found: "Status") -> list[tuple[str, tuple[str, ...], list[tuple[object, ...]]]]:
    engines: list[tuple[object, ...]] = [
        (e.id + (" (feeder)" if e.feeder else ""), e.state, e.messages_per_second, e.messages,
         e.cpu_seconds * 1e6 / e.messages if e.messages else None, e.max_rss_bytes // 2**20, e.held_batches)
        for e in found.engines
    ]  # fmt: skip
    servers: list[tuple[object, ...]] = [
        (s.id, f"{s.name} ({s.host}:{s.port})", s.state, s.delivered_per_second, s.connections, s.in_flight, s.queued_batches,
         s.delivered, s.bounced, s.deferred, s.uncertain)
        for s in found.delivery_servers
    ]  # fmt: skip
    campaigns: list[tuple[object, ...]] = [
        (c.id, c.name, c.state, c.recipients, c.delivered, c.bounced, c.expired, c.suppressed, c.queued) for c in found.campaigns
    ]
    receivers: list[tuple[object, ...]] = [
        (r.id, r.visits_recorded, r.visits_lost, r.visits_waiting_bytes // 1024) for r in found.inbound_processes
    ]
    return [
        ("engines", _ENGINE_COLUMNS, engines),
        ("inbound processes (counts since their start)", _INBOUND_COLUMNS, receivers),
        ("delivery servers (counts since the engines started)", _SERVER_COLUMNS, servers),
        ("unfinished campaigns", _CAMPAIGN_COLUMNS, campaigns),
    ]


@click.command("top", epilog=EPILOG)
@click.option("--interval", type=click.FloatRange(0.2, 60.0), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--count", type=click.IntRange(1), help="Stop after that many looks. Default: until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Write all that `status --json` writes, one line per look.")
def top(interval: float, count: int | None, as_json: bool) -> None:
    """Watch it live.

    Rates, connections, queues and deferrals per delivery server; engines; progress of campaigns. At a terminal it redraws in place;
    elsewhere it writes one line per look.
    """
    with_stores(lambda stores: _watch(stores, interval, count, as_json))


async def _watch(stores: Stores, interval: float, count: int | None, as_json: bool) -> None:
    import asyncio

    from msgspec import json

    from store import status

    looks = 0
    if as_json or not sys.stdout.isatty():
        while True:
            found = await status.gather(stores.pool, stores.redis)
            click.echo(json.encode(found).decode() if as_json else _line(found))
            looks += 1
            if looks == count:
                return
            await asyncio.sleep(interval)
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(), screen=count is None, auto_refresh=False) as live:
        while True:
            live.update(_screen(await status.gather(stores.pool, stores.redis)), refresh=True)
            looks += 1
            if looks == count:
                return
            await asyncio.sleep(interval)


def _line(found: "Status") -> str:
    rate = sum(engine.messages_per_second for engine in found.engines)
    servers = found.delivery_servers
    return (
        f"{time.strftime('%H:%M:%S', time.localtime(found.at))} engines={len(found.engines)} messages_per_second={rate:.1f} "
        f"connections={sum(s.connections for s in servers)} queued_batches={sum(s.queued_batches for s in servers)} "
        f"delivered={sum(s.delivered for s in servers)} bounced={sum(s.bounced for s in servers)} "
        f"deferrals={sum(s.deferred for s in servers)} trouble={len(found.trouble)}"
    )


def _screen(found: "Status") -> "Group":
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rate = sum(engine.messages_per_second for engine in found.engines)
    parts: list[Text | Table] = [
        Text(f"sluice top  {time.strftime('%H:%M:%S', time.localtime(found.at))}   {rate:,.0f} messages/s   "
             f"{len(found.engines)} engines   PostgreSQL {show(found.postgresql)}   Redis {show(found.redis)}", style="bold")
    ]  # fmt: skip
    for title, columns, rows in reversed(_tables(found)):
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, expand=False)
        for column in columns:
            made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left")
        for row in rows:
            made.add_row(*(Text(show(cell)) for cell in row))
        parts.append(made)
    parts += [Text(f"trouble: {show(sentence)}", style="bold red") for sentence in found.trouble]
    return Group(*parts)


@click.command("audit", epilog=EPILOG)
@number("campaign_id", "CAMPAIGN")
@click.option("--against", "logs", multiple=True, metavar="FILE", type=click.Path(exists=True, dir_okay=False),
              help="What a receiver logged as accepted: one JSON object a line with message_id and recipient, as the built-in sink "
                   "writes it. Repeatable: give every receiver's.")  # fmt: skip
@json_option
def audit(campaign_id: int, logs: tuple[str, ...], as_json: bool) -> None:
    """Prove what became of everybody in a campaign.

    It counts in the ledger. Clean means: input = delivered + bounced + expired + suppressed + cancelled + queued, nobody missing,
    nobody with two ends, records and progress agree. Possible duplicates are not a fault: each is an attempt whose link was lost
    before its reply was read, announced by a `u` record.

    With --against the ledger is compared with what receivers logged, by Message-ID and recipient. Then clean also means: nothing lost,
    no false bounce, nobody else's address, no copy beyond the first without its `u` record. Exit code 0 only when it is clean.
    """

    async def work(stores: Stores) -> "tuple[Audit, Against | None]":
        from store import accounting

        return await accounting.audit(stores.pool, campaign_id), await _against(stores, campaign_id, logs) if logs else None

    found, against = with_stores(work)
    clean = found.clean and (against is None or against.clean)
    if as_json:
        from msgspec import to_builtins

        write_json(to_builtins(found) | ({"against": to_builtins(against)} if against is not None else {}))
    else:
        facts((name.replace("_", " "), getattr(found, name)) for name in found.__struct_fields__)
        if against is not None:
            _say_against(against)
        click.echo("clean" if clean else "NOT clean")
    sys.exit(OK if clean else FAILED)


async def _against(stores: Stores, campaign_id: int, logs: tuple[str, ...]) -> "Against":
    import asyncio
    from pathlib import Path

    from compose.message_ids import MessageIds
    from control.sink_log import SinkLogs
    from store import acceptances

    lines = SinkLogs(map(Path, logs), MessageIds(stores.keyring, await acceptances.owner(stores.pool, campaign_id), campaign_id).number)
    return await acceptances.compare(stores.pool, campaign_id, lambda: asyncio.to_thread(lines.next), lambda: lines.other_mail)


def _say_against(against: "Against") -> None:
    """What the receivers' logs say, below what the ledger says."""
    click.echo("against what receivers logged:")
    facts((name.replace("_", " "), getattr(against, name)) for name in against.__struct_fields__ if name != "examples")
    for name, addresses in against.examples.items():
        click.echo(f"{name.replace('_', ' ')}: {', '.join(map(show, addresses))}")


COMMANDS: Final = (status_command, top, audit)

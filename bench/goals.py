"""The goals of docs/performance.md, judged from the rows of one run (pure). A goal whose rows are missing is left out, never guessed."""

from collections.abc import Callable
from typing import Final

from bench.measure import Goal, Row

SOURCE: Final = "smtp-source -d -s 20, C, constant"
FLOOR: Final = "floor, C, constant, DATA, 20 connections"
ENGINE: Final = "engine, DATA, 20 connections"

_Value = Callable[[dict[str, Row]], float]


def _cpu(rows: dict[str, Row], name: str) -> float:
    found = rows[name].cpu_us_per_message
    if not found:
        raise KeyError(name)
    return found


def _rate(rows: dict[str, Row], name: str) -> float:
    found = rows[name].messages_per_second
    if not found:
        raise KeyError(name)
    return found


def _costs(above: str, below: str) -> _Value:
    return lambda rows: _cpu(rows, above) / _cpu(rows, below)


def _per_round_trip(name: str, connections: int, seconds: float, window: int = 1) -> _Value:
    return lambda rows: _rate(rows, name) / (connections * window / seconds)


# number, what, how it is computed, at most (-1) or at least (+1), the bound
_GOALS: Final[tuple[tuple[int, str, _Value, int, float], ...]] = (
    (1, "engine end to end / smtp-source, CPU", _costs(ENGINE, SOURCE), -1, 0.75),
    (2, "aiosmtplib + EmailMessage / engine, CPU", _costs("aiosmtplib + EmailMessage, 20 connections", ENGINE), +1, 100.0),
    (2, "nodemailer pool + Handlebars / engine, CPU", _costs("nodemailer pool + Handlebars, 20 connections", ENGINE), +1, 40.0),
    (6, "20 ms, 10 connections, DATA: messages per round trip and connection",
     _per_round_trip("engine, DATA, 10 connections, 20 ms", 10, 0.02), +1, 0.9),
    (6, "20 ms, 10 connections, BDAT window 5 (what fits in 64 KiB): share of 5 per round trip",
     _per_round_trip("engine, BDAT window 5, 10 connections, 20 ms", 10, 0.02, 5), +1, 0.9),
    (6, "80 ms, 32 connections, DATA: messages/s", lambda rows: _rate(rows, "engine, DATA, 32 connections, 80 ms"), +1, 380.0),
    (7, "TLS / plain, CPU", _costs("engine, STARTTLS, DATA, 20 connections", ENGINE), -1, 2.5),
    (7, "BDAT / DATA, CPU", _costs("engine, BDAT window 5, 10 connections", ENGINE), -1, 0.75),
    (8, "100 kB messages on 2 cores: messages/s", lambda rows: _rate(rows, "2 engines, DATA, 20 connections, 100 kB"), +1, 5000.0),
    (10, "5,000 connections at 50 ms / 20 at 0 ms, CPU", _costs("engine, DATA, 5,000 connections, 50 ms", ENGINE), -1, 3.0),
    (11, "journal into PostgreSQL: outcomes/s", lambda rows: _rate(rows, "journal: ledger into PostgreSQL (client)"), +1, 50_000.0),
    (11, "accounting files: lines/s", lambda rows: _rate(rows, "journal: accounting files"), +1, 200_000.0),
    (12, "2 engines on 2 cores, 100,000 recipients: messages/s",
     lambda rows: _rate(rows, "2 engines, DATA, 20 connections, 100,000 recipients"), +1, 10_000.0),
)  # fmt: skip


def add_ratios(rows: list[Row]) -> None:
    """Set `ratio` of every sender: its CPU per message against smtp-source's of the same run."""
    source = next((row.cpu_us_per_message for row in rows if row.name == SOURCE), None)
    for row in rows:
        if source and row.cpu_us_per_message and row.sink_cpu_us_per_message is not None:
            row.ratio = round(row.cpu_us_per_message / source, 3)


def judge(rows: list[Row]) -> list[Goal]:
    """Every goal that these rows can answer."""
    by_name = {row.name: row for row in rows if not row.skipped}
    made = []
    for number, name, value_of, direction, bound in _GOALS:
        try:
            value = value_of(by_name)
        except KeyError:
            continue
        met = value <= bound if direction < 0 else value >= bound
        made.append(Goal(number=number, name=name, value=round(value, 3), goal=f"{'<=' if direction < 0 else '>='} {bound:,g}", met=met))
    return made

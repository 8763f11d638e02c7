"""The goals of docs/performance.md, judged from the rows of one run (pure). A goal whose rows are missing is left out, never guessed."""

from collections.abc import Callable
from typing import Final

from bench.measure import Goal, Row

SOURCE: Final = "smtp-source -d -s 20, C, constant"
FLOOR: Final = "floor, C, constant, DATA, 20 connections"
ENGINE: Final = "engine, DATA, 20 connections"
SIGNATURE: Final = "one RSA-2048 signature by OpenSSL"
LANES: Final = "engine, DATA, signed RSA-2048, 8 lanes"
OPENSSL: Final = "engine, DATA, signed RSA-2048, OpenSSL"
LANES_TWO: Final = "2 engines, DATA, signed RSA-2048, 8 lanes"
OPENSSL_TWO: Final = "2 engines, DATA, signed RSA-2048, OpenSSL"
AIOSMTPLIB: Final = "aiosmtplib + EmailMessage, 20 connections"
NODEMAILER: Final = "nodemailer pool + Handlebars, 20 connections"
NODEMAILER_SIGNED: Final = "nodemailer pool + Handlebars + its DKIM"
POSTFIX: Final = "Postfix relay, all its processes"
POSTFIX_SIGNED: Final = "Postfix relay + opendkim RSA-2048"
MANY_CONNECTIONS: Final = "engine, DATA, 5,000 connections, 50 ms"
IDLE: Final = "engine, idle connections"
SHALLOW: Final = "engine, DATA, 100,000 recipients queued"
DEEP: Final = "engine, DATA, 10 million recipients queued"
ONE_KEY: Final = "composition, signed, one key, {}"
MANY_KEYS: Final = "composition, signed, 10,000 keys in turn, {}"
TWO: Final = "2 engines, DATA, 20 connections, 100,000 recipients"
TWO_LARGE: Final = "2 engines, DATA, 20 connections, 100 kB"
WAYS: Final = ("OpenSSL", "8 lanes")

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
    """CPU of one row against that of another."""
    return lambda rows: _cpu(rows, above) / _cpu(rows, below)


def _beside(name: str) -> _Value:
    """CPU of a row against that of what was measured beside it, run by run."""

    def value(rows: dict[str, Row]) -> float:
        beside = rows[name].beside_cpu_us_per_message
        if not beside:
            raise KeyError(name)
        return _cpu(rows, name) / beside

    return value


def _rates(name: str, against: str = "") -> _Value:
    return lambda rows: _rate(rows, name) / (_rate(rows, against) if against else 1.0)


def _per_round_trip(name: str, connections: int, seconds: float, window: int = 1) -> _Value:
    return lambda rows: _rate(rows, name) / (connections * window / seconds)


def _memory(rows: dict[str, Row]) -> float:
    found = rows[DEEP].memory_mib
    if not found:
        raise KeyError(DEEP)
    return found


def _per_connection(rows: dict[str, Row]) -> float:
    found = rows[IDLE].bytes_per_connection
    if found is None:
        raise KeyError(IDLE)
    return found / 1024


# number, what, how it is computed, at most (-1) or at least (+1), the bound
_GOALS: Final[tuple[tuple[int, str, _Value, int, float], ...]] = (
    (1, "engine end to end / smtp-source, CPU", _costs(ENGINE, SOURCE), -1, 0.75),
    (2, "aiosmtplib + EmailMessage / engine, CPU", _beside(AIOSMTPLIB), +1, 100.0),
    (2, "nodemailer pool + Handlebars / engine, CPU", _beside(NODEMAILER), +1, 40.0),
    (2, "Postfix relay / engine, CPU", _beside(POSTFIX), +1, 60.0),
    (3, "signed with 8 lanes / one OpenSSL signature, CPU", _beside(LANES), -1, 0.5),
    (3, "signed by OpenSSL / one OpenSSL signature, CPU", _beside(OPENSSL), -1, 1.15),
    (4, "nodemailer with its DKIM / engine signed, CPU", _beside(NODEMAILER_SIGNED), +1, 12.0),
    (4, "Postfix + opendkim / engine signed, CPU", _beside(POSTFIX_SIGNED), +1, 25.0),
    (5, "2 engines / 1, signed, 8 lanes, rate", _rates(LANES_TWO, LANES), +1, 1.6),
    (5, "2 engines / 1, signed, OpenSSL, rate", _rates(OPENSSL_TWO, OPENSSL), +1, 1.6),
    (5, "2 engines, signed, 8 lanes: messages/s", _rates(LANES_TWO), +1, 12_000.0),
    (5, "2 engines, signed, OpenSSL: messages/s", _rates(OPENSSL_TWO), +1, 5_000.0),
    (6, "20 ms, 10 connections, DATA: messages per round trip and connection",
     _per_round_trip("engine, DATA, 10 connections, 20 ms", 10, 0.02), +1, 0.9),
    (6, "20 ms, 10 connections, BDAT window 5 (what fits in 64 KiB): share of 5 per round trip",
     _per_round_trip("engine, BDAT window 5, 10 connections, 20 ms", 10, 0.02, 5), +1, 0.9),
    (6, "80 ms, 32 connections, DATA: messages/s", _rates("engine, DATA, 32 connections, 80 ms"), +1, 380.0),
    (7, "TLS / plain, CPU", _costs("engine, STARTTLS, DATA, 20 connections", ENGINE), -1, 2.5),
    (7, "BDAT / DATA, CPU", _costs("engine, BDAT window 5, 10 connections", ENGINE), -1, 0.75),
    *((7, f"10,000 DKIM keys in turn / one key, {way}, CPU", _costs(MANY_KEYS.format(way), ONE_KEY.format(way)), -1, 1.05) for way in WAYS),
    (8, "100 kB messages on 2 cores: messages/s", _rates(TWO_LARGE), +1, 5000.0),
    (9, "10 million recipients queued / 100,000, CPU", _costs(DEEP, SHALLOW), -1, 1.1),
    (9, "engine memory with 10 million queued, MiB", _memory, -1, 512.0),
    (10, "5,000 connections at 50 ms / 20 at 0 ms, CPU", _costs(MANY_CONNECTIONS, ENGINE), -1, 3.0),
    (10, "KiB per idle plain connection", _per_connection, -1, 8.0),
    (11, "journal into PostgreSQL: outcomes/s", _rates("journal: ledger into PostgreSQL (client)"), +1, 50_000.0),
    (11, "accounting files: lines/s", _rates("journal: accounting files"), +1, 200_000.0),
    (12, "2 engines on 2 cores, 100,000 recipients: messages/s", _rates(TWO), +1, 10_000.0),
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

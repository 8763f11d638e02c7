"""What all `sluice` commands share: settings, open stores, output as table or JSON, errors as one sentence, exit codes.

Imports here must stay cheap: `sluice --help` and shell completion pay for them. What is heavy (asyncio, asyncpg, redis, rich) is imported
inside the function that needs it. Help is dressed by rich-click for people at a terminal; a pipe gets plain click, in half the time.
"""

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeVar

if TYPE_CHECKING:
    import click
    import redis.asyncio

    from config.keys import Keyring
    from config.settings import Settings
    from control.services import Services
    from store.embedded import Backends
    from store.postgres import Pool
elif sys.stdout.isatty():
    import rich_click as click
else:
    import click

__all__ = ["click"]

OK: Final = 0
FAILED: Final = 1  # it ran, and the answer is no: audit not clean, check failed, not allowed in this state
USAGE: Final = 2  # it could not run: wrong arguments, refused settings, a store that does not answer
INTERRUPTED: Final = 130

_OTHERS_SECONDS: Final = 600.0

EPILOG: Final = (
    "Exit codes: 0 = ok; 1 = it ran and the answer is no (audit not clean, check failed, not allowed in this state); "
    "2 = it could not run (arguments, settings, a store or port that is not available)."
)


class _HasName(Protocol):
    @property
    def id(self) -> int: ...
    @property
    def name(self) -> str: ...


_T = TypeVar("_T")
_Named = TypeVar("_Named", bound=_HasName)
Command = TypeVar("Command", bound=Callable[..., Any])


class Failed(Exception):
    """The command ran and its answer is no: exit code 1, with the sentence on standard error unless it was said already."""


def config_path() -> Path | None:
    """The settings file: `--config`, else SLUICE_CONFIG, else the default place (None)."""
    root = click.get_current_context().find_root()
    given = root.params.get("config")
    return Path(given) if given else None


def load_settings() -> "Settings":
    """Settings of this process; what it logs goes to standard error from here on. Raises ConfigurationError."""
    from config import load, logs

    logs.configure("warning")

    return load.load(config_path(), os.environ)


def become(module: str, *arguments: str) -> NoReturn:
    """Replace this process by one of ours: signals and exit code are then its own, as a service manager wants it."""
    from control import machine

    load_settings()  # refuse bad settings here, with the sentence the other commands give
    os.execve(sys.executable, list(machine.python(module, *arguments)), machine.environment(config_path()))


def number(name: str, metavar: str) -> Callable[[Command], Command]:
    """An argument that is the number of something stored, no larger than PostgreSQL can ask for."""
    return click.argument(name, type=click.IntRange(max=2**63 - 1), metavar=metavar)


def json_option(command: Command) -> Command:
    """Add `--json` to a command that reads."""
    return click.option("--json", "as_json", is_flag=True, help="Write one JSON value to standard output instead of a table.")(command)


class Stores:
    """PostgreSQL, Redis, keys, and whom this command acts for: the local administrator."""

    def __init__(self, settings: "Settings", pool: "Pool", redis: "redis.asyncio.Redis",
                 keyring: "Keyring", user_id: int, admin_key: str) -> None:  # fmt: skip
        self.settings = settings
        self.pool = pool
        self.redis = redis
        self.keyring = keyring
        self.user_id = user_id
        self.admin_key = admin_key

    @property
    def services(self) -> "Services":
        """What the API's handlers ask for. `services.announce` tells the engines of a change and never fails."""
        from control.services import Services

        return Services(pool=self.pool, redis=self.redis, keyring=self.keyring, settings=self.settings)


async def call(stores: Stores, handler: Any, **arguments: Any) -> Any:
    """Call one of the API's route handlers in this process, as the local administrator: same checks, same words, no HTTP."""
    from control.guards import Caller

    return await handler.fn(None, caller=Caller(stores.user_id, "admin"), services=stores.services, **arguments)


def convert(fields: dict[str, Any], kind: Any) -> Any:
    """Options as one of the API's own requests. Raises Invalid in the words the API uses."""
    import msgspec

    from control.errors import field_error
    from domain.errors import Invalid

    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        found = field_error(place.strip("`."), message, kind)
        raise Invalid(found.field, found.reason) from None


def dump(value: object) -> str:
    """A value as indented JSON; Structs become objects, datetimes ISO 8601."""
    import msgspec

    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def write_json(value: object) -> None:
    """One JSON value on standard output."""
    click.echo(dump(value))


def say(sentence: str) -> None:
    """One line for the operator, on standard error."""
    click.echo(sentence, err=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table on standard output. Columns that begin with `>` are right-aligned. Text is shown as it is, never as markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    made = Table(title=title or None, title_justify="left", box=None if not sys.stdout.isatty() else _box(), pad_edge=False)
    for column in columns:
        made.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    count = 0
    for row in rows:
        made.add_row(*(Text(show(cell)) for cell in row))
        count += 1
    if count:
        console.print(made)
    else:
        click.echo(f"{title}: none" if title else "none")


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def facts(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair a line."""
    # Numbers that are names are not grouped: 18025 is a port, not a count
    listed = [(name, str(value) if isinstance(value, int) and (name in ("port", "id") or name.endswith("_id")) else show(value))
              for name, value in pairs]  # fmt: skip
    width = max((len(name) for name, _ in listed), default=0)
    for name, value in listed:
        click.echo(f"{name:<{width}}  {value}")


def show(value: object) -> str:
    """A value for people: numbers grouped, times to the second, nothing for None; no control characters from outside."""
    from datetime import datetime

    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, tuple | list):
        return ", ".join(f"{item:g}" if isinstance(item, float) else show(item) for item in value)
    if isinstance(value, datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return "".join(character if character.isprintable() else " " for character in str(value))


def fail(sentence: str) -> NoReturn:
    """End the command with exit code 1 and this sentence on standard error."""
    raise Failed(sentence)


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn every expected exception into a sentence on standard error and an exit code. A bug of ours keeps its traceback."""
    from click.exceptions import Abort, ClickException, Exit

    try:
        yield
    except Exit as ended:
        sys.exit(ended.exit_code)
    except ClickException as error:
        error.show()
        sys.exit(USAGE)
    except (Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except Failed as error:
        if str(error):
            say(f"sluice: {error}")
        sys.exit(FAILED)
    except Exception as error:
        code, sentences = _sentences(error)
        if not sentences:
            raise
        for sentence in sentences:
            say(f"sluice: {sentence}")
        sys.exit(code)


def _sentences(error: Exception) -> tuple[int, list[str]]:
    """Exit code and sentences of an expected error; no sentence for a bug."""
    from domain import errors

    match error:
        case errors.ConfigurationError():
            return USAGE, error.problems
        case errors.NotFound():
            return USAGE, [f"{error}; `sluice {error.kind.split()[-1]} list` shows what there is" if _is_listed(error.kind) else str(error)]
        case errors.Conflict():
            return FAILED, [str(error)]
        case errors.SluiceError():
            return USAGE, [str(error)]
        case OSError():
            place = f" ({error.filename})" if error.filename else ""
            return USAGE, [f"{error.strerror or error}{place}"]
    if type(error).__module__.startswith("redis."):
        return USAGE, [f"Redis does not answer: {error}; check redis.url (SLUICE_REDIS_URL)"]
    return FAILED, []


def _is_listed(kind: str) -> bool:
    return kind in ("campaign", "delivery server", "server", "list")


def with_stores(work: "Callable[[Stores], Awaitable[_T]]") -> _T:
    """Run `work` with the stores of the settings: attached to or started when embedded, migrated, closed afterwards.

    Raises Unavailable when one of them does not answer, ConfigurationError when the settings are refused.
    """
    import asyncio

    from config.load import state_directory
    from store import embedded, migrate

    settings = load_settings()
    state = state_directory(settings)
    # Private servers are children of the thread that starts them, so this happens here and not inside the event loop.
    with embedded.resolve(settings.database.url, settings.redis.url, state) as backends, _in_use(state, owner=backends.owned):

        async def opened() -> _T:
            await migrate.apply(backends.database_url)
            async with open_stores(settings, backends) as stores:
                return await work(stores)

        return asyncio.run(opened())


@contextlib.contextmanager
def _in_use(state: Path, *, owner: bool) -> Iterator[None]:
    """Private servers end with the command that started them: that one waits here for others that attached meanwhile."""
    import fcntl
    import time

    try:
        lock = (state / "commands.lock").open("a")
    except OSError:  # no state directory: the stores are elsewhere
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield
        deadline = time.monotonic() + _OTHERS_SECONDS
        while owner and time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                time.sleep(0.05)


@contextlib.asynccontextmanager
async def open_stores(settings: "Settings", backends: "Backends") -> AsyncIterator[Stores]:
    """The stores at `backends`, whose database is migrated, for the local administrator. Raises Unavailable, Failed."""
    from config.keys import load_keyring
    from config.load import admin_key_path
    from store import batch_queue, postgres, users

    pool = await postgres.open_pool(backends.database_url, 4, settings.database.command_timeout_seconds)
    redis = batch_queue.connect(backends.redis_url, settings.redis.timeout_seconds)
    try:
        key = await users.ensure_admin(pool, admin_key_path(settings), settings.control.admin_key)
        async with postgres.connection(pool) as conn:
            owner = await users.find_key(conn, users.prefix_of(key) or "")
        if owner is None:
            fail("the local administrator's key is revoked or its user disabled; remove admin.key from the state directory")
        yield Stores(settings, pool, redis, load_keyring(settings), owner.user_id, key)
    finally:
        await redis.aclose()
        await pool.close()


async def find_by_name(kind: str, reference: str, page: "Callable[[int, int], Awaitable[Sequence[_Named]]]") -> "_Named":
    """The thing `reference` means: its name, or its id. `page(after, limit)` gives things by id. Raises NotFound.

    A name wins over an id, so a list named `7` can be reached; the walk is over what one operator has, not over subscribers.
    """
    from domain.errors import NotFound

    after, by_id = 0, None
    while things := await page(after, 500):
        for thing in things:
            if thing.name == reference:
                return thing
            if str(thing.id) == reference:
                by_id = thing
        after = things[-1].id
    if by_id is None:
        raise NotFound(kind, reference)
    return by_id

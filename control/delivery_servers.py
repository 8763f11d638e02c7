"""Delivery servers: create, change, delete, and `POST .../test`, which really sends (requirements 8-27)."""

import ipaddress
import re
from typing import Any

import msgspec
from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from control import trial
from control.guards import Caller
from control.parameters import MAX_ID, After, Id, Limit, Page, given, one_line
from control.services import Services
from domain import address
from domain.egress import DeliveryServer, DeliveryServerLimits, OnUncertain, Security
from domain.errors import Invalid
from store import egress
from store.postgres import connection

MAX_PASSWORD_CHARACTERS = 1024
MAX_RETRIES = 100
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9])?)*").fullmatch

# field -> lowest, highest, why the bound is there
RANGES: dict[str, tuple[float, float, str]] = {
    "port": (1, 65535, ""),
    "connect_timeout_seconds": (0.1, 300, ""),
    "fallback_server_id": (1, MAX_ID, ""),
    "limits.max_connections": (0, 10_000, "0 pauses the server"),
    "limits.max_messages_per_second": (0, 1_000_000, "0 means no limit"),
    "limits.max_messages_per_connection": (0, 1_000_000, "0 means no limit"),
    "limits.bdat_window": (1, 50, "it bounds how many messages can be sent twice when a connection is lost"),
    "limits.final_dot_timeout_seconds": (60, 3600, "shorter ones make servers deliver twice, RFC 5321 4.5.3.2.6"),
    "limits.command_timeout_seconds": (1, 3600, ""),
    "limits.retry_growth": (1, 100, "1 means that the last wait of the schedule repeats"),
    "limits.retry_longest_seconds": (1, 7 * 86400, ""),
    "limits.max_age_seconds": (60, 30 * 86400, ""),
    "limits.fallback_after_seconds": (1, 7 * 86400, ""),
}


class DeliveryServerCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new delivery server. `mfrom` is a domain (signed return paths below it) or one address, used exactly so.

    `fallback_server_id`: another server of the same user, through which waiting mail goes out, composed for it, once this one could not
    be used for `limits.fallback_after_seconds`; null for none. Mail comes back by itself when this one works again.
    """

    name: str
    host: str
    port: int = 25
    security: Security = "none"
    connect_timeout_seconds: float = 10.0
    username: str = ""
    password: str = ""
    link_domain: str = ""
    open_domain: str = ""
    mfrom: str = ""
    enforced_from: str = ""
    use_list_sender_as_mfrom: bool = False
    use_list_sender_as_from: bool = False
    fallback_server_id: int | None = None
    limits: DeliveryServerLimits = DeliveryServerLimits()
    enabled: bool = True


class DeliveryServerLimitsUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The limits that change."""

    max_connections: int | UnsetType = UNSET
    max_messages_per_second: float | UnsetType = UNSET
    max_messages_per_connection: int | UnsetType = UNSET
    pipelining: bool | UnsetType = UNSET
    chunking: bool | UnsetType = UNSET
    eightbitmime: bool | UnsetType = UNSET
    bdat_window: int | UnsetType = UNSET
    final_dot_timeout_seconds: float | UnsetType = UNSET
    command_timeout_seconds: float | UnsetType = UNSET
    retry_schedule_seconds: tuple[float, ...] | UnsetType = UNSET
    retry_growth: float | UnsetType = UNSET
    retry_longest_seconds: float | UnsetType = UNSET
    max_age_seconds: float | UnsetType = UNSET
    on_uncertain: OnUncertain | UnsetType = UNSET
    fallback_after_seconds: float | UnsetType = UNSET


class DeliveryServerUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes; engines use it within a second. An empty `username` switches authentication off and forgets the password."""

    name: str | UnsetType = UNSET
    host: str | UnsetType = UNSET
    port: int | UnsetType = UNSET
    security: Security | UnsetType = UNSET
    connect_timeout_seconds: float | UnsetType = UNSET
    username: str | UnsetType = UNSET
    password: str | UnsetType = UNSET
    link_domain: str | UnsetType = UNSET
    open_domain: str | UnsetType = UNSET
    mfrom: str | UnsetType = UNSET
    enforced_from: str | UnsetType = UNSET
    use_list_sender_as_mfrom: bool | UnsetType = UNSET
    use_list_sender_as_from: bool | UnsetType = UNSET
    fallback_server_id: int | UnsetType | None = UNSET
    limits: DeliveryServerLimitsUpdate | UnsetType = UNSET
    enabled: bool | UnsetType = UNSET


class DeliveryServerShown(msgspec.Struct, frozen=True, kw_only=True):
    """A delivery server as it is shown: everything but the password."""

    id: int
    user_id: int
    name: str
    host: str
    port: int
    security: Security
    connect_timeout_seconds: float
    username: str
    has_password: bool
    link_domain: str
    open_domain: str
    mfrom: str
    enforced_from: str
    use_list_sender_as_mfrom: bool
    use_list_sender_as_from: bool
    fallback_server_id: int | None
    limits: DeliveryServerLimits
    enabled: bool
    version: int


class DeliveryServerTest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the test message goes."""

    to: str


class DeliveryServerController(Controller):
    """The ways out of one user."""

    path = "/delivery-servers"
    tags = ("delivery servers",)

    @post("/", operation_id="createDeliveryServer", summary="Create a delivery server")
    async def create(
        self, data: JSONBody[DeliveryServerCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> DeliveryServerShown:
        """The password is sealed and never shown again."""
        fields = checked({name: getattr(data, name) for name in data.__struct_fields__})
        password = fields.pop("password")
        if bool(password) != bool(fields["username"]):
            raise Invalid(
                "password" if fields["username"] else "username", "user name and password belong together; leave both empty for none"
            )
        server = await egress.create(services.pool, caller.user_id, fields, sealer(services, password) if password else None)
        await services.announce("egress")
        return shown(server)

    @get("/", operation_id="listDeliveryServers", summary="List delivery servers")
    async def page(
        self, caller: NamedDependency[Caller], services: NamedDependency[Services], after: After = 0, limit: Limit = 100
    ) -> Page[DeliveryServerShown]:
        """By id."""
        async with connection(services.pool) as conn:
            found = await egress.list_servers(conn, caller.sees, after, limit)
        return Page([shown(server) for server in found], found[-1].id if len(found) == limit else None)

    @get("/{server_id:int}", operation_id="getDeliveryServer", summary="One delivery server")
    async def one(self, server_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> DeliveryServerShown:
        """By id."""
        async with connection(services.pool) as conn:
            return shown(await egress.get(conn, caller.sees, server_id))

    @patch("/{server_id:int}", operation_id="updateDeliveryServer", summary="Change a delivery server")
    async def update(
        self,
        server_id: Id,
        data: JSONBody[DeliveryServerUpdate],
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
    ) -> DeliveryServerShown:
        """Fields and limits that are left out stay."""
        async with connection(services.pool) as conn:
            server = await egress.get(conn, caller.sees, server_id)
        fields = given(data)
        if "limits" in fields:
            fields["limits"] = msgspec.structs.replace(server.limits, **given(data.limits))  # type: ignore[arg-type]
        fields = checked(fields)
        password = fields.pop("password", None)
        username = fields.get("username", server.username)
        seal: egress.Seal | None = None
        if not username:
            if password:
                raise Invalid("username", "is needed with a password")
            seal = _forget if server.password_sealed else None
        elif isinstance(password, str) and password:
            seal = sealer(services, password)
        elif password == "" or not server.password_sealed:
            raise Invalid("password", "is needed with a user name; clear both to switch authentication off")
        server = await egress.update(services.pool, caller.sees, server_id, fields, seal)
        await services.announce("egress")
        return shown(server)

    @delete("/{server_id:int}", operation_id="deleteDeliveryServer", summary="Delete a delivery server")
    async def remove(self, server_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """Refused while a campaign that has not ended needs it."""
        await egress.delete(services.pool, caller.sees, server_id)
        await services.announce("egress")

    @post("/{server_id:int}/test", operation_id="testDeliveryServer", summary="Send a test message", status_code=200)
    async def test(
        self, server_id: Id, data: JSONBody[DeliveryServerTest], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> trial.TrialResult:
        """Connects as an engine would and sends one message. 200 also when that fails: `sentence` says at which stage and why."""
        to = address.parse(data.to, "to")
        async with connection(services.pool) as conn:
            server = await egress.get(conn, caller.sees, server_id)
        password = services.keyring.open(server.password_sealed, password_context(server.id)).decode() if server.password_sealed else ""
        return await trial.send(server, password, to)


def password_context(server_id: int) -> bytes:
    """What the password of a delivery server is sealed with, besides the key (S11); engines open it with the same."""
    return b"delivery_servers:%d" % server_id


def sealer(services: Services, password: str) -> egress.Seal:
    """Seals one password for whichever row it ends up in."""
    return lambda server_id: services.keyring.seal(password.encode(), password_context(server_id))


def _forget(_: int) -> bytes:
    return b""


def shown(server: DeliveryServer) -> DeliveryServerShown:
    """Without the password."""
    fields = {name: getattr(server, name) for name in DeliveryServerShown.__struct_fields__ if name != "has_password"}
    return DeliveryServerShown(**fields, has_password=bool(server.password_sealed))


def checked(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are there, each checked and in its stored form. Raises Invalid naming the first that is refused."""
    fields = dict(fields)
    if "name" in fields:
        fields["name"] = one_line("name", fields["name"], minimum=1)
    if "host" in fields:
        fields["host"] = check_host(fields["host"])
    if "username" in fields:
        one_line("username", fields["username"])
    if "password" in fields:
        one_line("password", fields["password"], maximum=MAX_PASSWORD_CHARACTERS)
    for name in ("link_domain", "open_domain"):
        if fields.get(name):
            fields[name] = address.parse_domain(fields[name], name)
    if fields.get("mfrom"):
        mfrom = fields["mfrom"]
        fields["mfrom"] = address.parse(mfrom, "mfrom").wire if "@" in mfrom else address.parse_domain(mfrom, "mfrom")
    if fields.get("enforced_from"):
        fields["enforced_from"] = address.parse(fields["enforced_from"], "enforced_from").text
    for name in ("port", "connect_timeout_seconds", "fallback_server_id"):
        if fields.get(name) is not None:
            _in_range(name, fields[name])
    if "limits" in fields:
        limits: DeliveryServerLimits = fields["limits"]
        for name in RANGES:
            if name.startswith("limits."):
                _in_range(name, getattr(limits, name.removeprefix("limits.")))
        check_schedule(limits.retry_schedule_seconds)
    return fields


def check_host(host: str) -> str:
    """A host name or an IP address, in lower case and A-labels. Raises Invalid."""
    host = host.lower()
    try:
        return str(ipaddress.ip_address(host.removeprefix("[").removesuffix("]")))
    except ValueError:
        pass
    if not host.isascii():
        return address.parse_domain(host, "host")
    if not _HOST(host):
        raise Invalid("host", "must be a host name or an IP address, without scheme or port", host)
    if host.replace(".", "").isdigit():
        raise Invalid("host", "is not a valid IP address", host)
    return host


def check_schedule(schedule: tuple[float, ...]) -> None:
    """Raises Invalid."""
    if not 1 <= len(schedule) <= MAX_RETRIES:
        raise Invalid("limits.retry_schedule_seconds", f"must have 1 to {MAX_RETRIES} waits; the last repeats")
    for i, seconds in enumerate(schedule):
        if not 1 <= seconds <= 7 * 86400:
            raise Invalid(f"limits.retry_schedule_seconds[{i}]", "must be 1 second to 7 days", seconds)


def _in_range(field: str, value: float) -> None:
    lowest, highest, why = RANGES[field]
    if not lowest <= value <= highest:
        raise Invalid(field, f"must be {lowest:g} to {highest:,g}{f' ({why})' if why else ''}".replace(",", " "), value)

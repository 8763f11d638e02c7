"""DKIM keys: make, import, list, activate, retire. The private half is sealed at once and never shown again (S11, S12)."""

import asyncio
import datetime as dt
from typing import Annotated, Literal

import msgspec
from litestar import Controller, delete, get, post
from litestar.di import NamedDependency
from litestar.params import JSONBody, QueryParameter

from compose import dkim_keys, header_rules
from control.guards import Caller
from control.name_server import NameServer
from control.parameters import After, Id, Limit, Page
from control.services import Services
from domain import address, dkim
from domain.campaign import CampaignContent
from domain.dkim import Algorithm, DkimKey, State
from domain.egress import DeliveryServer
from domain.errors import Conflict, Invalid
from domain.sender_domain import parents, same_key
from store import dkim as stored
from store.postgres import PooledConnection, connection


class DkimKeyCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new key, made here or brought along: `private_key` is PEM without a password; then its kind and size are its own.

    `selector` empty: one that tells kind and month. `activate` null: sign with it at once if no key of its kind signs for the
    domain, else let it wait until its record is published. `bits` are those of RSA.
    """

    domain: str
    selector: str = ""
    algorithm: Algorithm = "rsa-sha256"
    bits: Literal[1024, 2048, 3072, 4096] = 2048
    private_key: str = ""
    activate: bool | None = None


class DkimKeyShown(msgspec.Struct, frozen=True, kw_only=True):
    """A key as it is shown: everything but its private half. `record` is the text of the TXT record named `record_name`."""

    id: int
    user_id: int
    domain: str
    selector: str
    algorithm: Algorithm
    bits: int
    state: State
    record_name: str
    record: str
    zone_line: str
    warnings: list[str]
    created_at: dt.datetime
    activated_at: dt.datetime | None
    retired_at: dt.datetime | None


class DkimRecordCheck(msgspec.Struct, frozen=True, kw_only=True):
    """What the DNS says of a key. `published` null: no name server answered; `found`: the TXT records under its name."""

    key_id: int
    record_name: str
    published: bool | None
    says: str
    found: list[str]
    verified_at: dt.datetime | None


class DkimKeyController(Controller):
    """The DKIM keys of one user's domains."""

    path = "/dkim-keys"
    tags = ("DKIM keys",)

    @post("/", operation_id="createDkimKey", summary="Make or import a DKIM key")
    async def create(
        self, data: JSONBody[DkimKeyCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> DkimKeyShown:
        """Publish `record` at `record_name` in the DNS. The first key of a kind signs at once; a later one waits to be activated."""
        domain = address.parse_domain(data.domain, "domain")
        selector = dkim.check_selector(data.selector, domain) if data.selector else ""
        if data.private_key:
            made = dkim_keys.read_pem(data.private_key)
        else:
            made = await asyncio.to_thread(dkim_keys.make, data.algorithm, data.bits)
        if not selector:
            async with connection(services.pool) as conn:
                selector = free_selector(made.algorithm, await stored.selectors(conn, caller.user_id, domain), dt.datetime.now(dt.UTC))
            dkim.check_selector(selector, domain)
        key = await stored.create(
            services.pool,
            caller.user_id,
            domain=domain,
            selector=selector,
            algorithm=made.algorithm,
            bits=made.bits,
            public_key=made.public_key,
            seal=lambda key_id: services.keyring.seal(made.private_key, dkim.seal_context(key_id)),
            activate=data.activate,
        )
        await services.announce("dkim")
        return shown(key)

    @get("/", operation_id="listDkimKeys", summary="List DKIM keys")
    async def page(
        self,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        after: After = 0,
        limit: Limit = 100,
        domain: Annotated[str | None, QueryParameter(description="Only those of this domain.")] = None,
    ) -> Page[DkimKeyShown]:
        """By id."""
        name = None if domain is None else address.parse_domain(domain, "domain")
        async with connection(services.pool) as conn:
            found = await stored.list_keys(conn, caller.sees, name, after, limit)
        return Page([shown(key) for key in found], found[-1].id if len(found) == limit else None)

    @get("/{key_id:int}", operation_id="getDkimKey", summary="One DKIM key")
    async def one(self, key_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> DkimKeyShown:
        """By id."""
        async with connection(services.pool) as conn:
            return shown(await stored.get(conn, caller.sees, key_id))

    @post("/{key_id:int}/activate", operation_id="activateDkimKey", summary="Sign with this key", status_code=200)
    async def activate(
        self,
        key_id: Id,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        check: Annotated[bool, QueryParameter(description="Only if its record is in the DNS.")] = False,
    ) -> DkimKeyShown:
        """Engines sign with it within a second; the key of its kind that signed so far retires. Publish its record first.

        With `check` it is refused (409) as long as the DNS does not show the record.
        """
        if check and not (found := await _look(services, caller, key_id)).published:
            raise Conflict(f"{found.record_name} {found.says}; publish its record and try again")
        key = await stored.activate(services.pool, caller.sees, key_id)
        await services.announce("dkim")
        return shown(key)

    @post("/{key_id:int}/check", operation_id="checkDkimKey", summary="Look for the record of a key in the DNS", status_code=200)
    async def check(self, key_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> DkimRecordCheck:
        """A record that is found proves that the domain is yours: from then on others cannot send from it."""
        return await _look(services, caller, key_id)

    @post("/{key_id:int}/retire", operation_id="retireDkimKey", summary="Sign with this key no more", status_code=200)
    async def retire(self, key_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> DkimKeyShown:
        """Leave its record published for a week: mail that it has signed is still under way."""
        key = await stored.retire(services.pool, caller.sees, key_id)
        await services.announce("dkim")
        return shown(key)

    @delete("/{key_id:int}", operation_id="deleteDkimKey", summary="Forget a DKIM key")
    async def remove(self, key_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """For good; refused while it signs."""
        await stored.delete(services.pool, caller.sees, key_id)


async def _look(services: Services, caller: Caller, key_id: int) -> DkimRecordCheck:
    async with connection(services.pool) as conn:
        key = await stored.get(conn, caller.sees, key_id)
    facts = await NameServer(services.settings.preflight).key(key)
    published = None if facts.found is None else any(same_key(key.record, text) for text in facts.found)
    if published:
        says = "is published"
    elif facts.found:
        says = "holds another key"
    else:
        says = "could not be looked up: no name server answers" if facts.found is None else "is not in the DNS"
    verified_at = None if published is None else await stored.note_record(services.pool, key.id, there=published)
    return DkimRecordCheck(
        key_id=key.id, record_name=key.record_name, published=published, says=says, found=list(facts.found or ()), verified_at=verified_at
    )


async def check_owner(conn: PooledConnection, user_id: int, content: CampaignContent, server: DeliveryServer) -> None:
    """Raise Invalid when nobody says who it is from, or the From domain, or one above, was proved to be somebody else's (bad input 43)."""
    field, sender = header_rules.from_address(content, server)
    if not sender:
        raise Invalid(field, "is missing; give one, or give the list a sender address")
    domain = header_rules.address_octets(field, sender)[0].rpartition(b"@")[2].decode("ascii").lower()
    theirs = await stored.foreign_domain(conn, user_id, parents(domain))
    if theirs is not None:
        raise Invalid(field, f"{theirs} belongs to another user of this system, who has proved it by a DNS record", sender)


def shown(key: DkimKey) -> DkimKeyShown:
    """Without the private half."""
    kept = {name: getattr(key, name) for name in DkimKeyShown.__struct_fields__ if name != "warnings"}
    return DkimKeyShown(**kept, warnings=dkim_keys.warnings(key.algorithm, key.bits))


def free_selector(algorithm: Algorithm, taken: set[str], now: dt.datetime) -> str:
    """`rsa202611`, or the next of `rsa202611-2`, ... that the domain does not use. Raises Invalid after a thousand."""
    base = f"{'rsa' if algorithm == dkim.RSA else 'ed'}{now:%Y%m}"
    for selector in (base, *(f"{base}-{number}" for number in range(2, 1000))):
        if selector not in taken:
            return selector
    raise Invalid("selector", "is needed: all those that are made up are taken")

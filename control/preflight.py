"""Pre-flight: what providers would object to in a campaign, before anybody has seen it; and what holds its start.

`POST /campaigns/{id}/preflight` composes samples, signs them, and asks the DNS. Starting a campaign looks at the samples alone (or at
everything, or at nothing: `preflight.hold_start`), because a name server that is away must not stop mail.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import msgspec
from litestar import Controller, post
from litestar.di import NamedDependency

from compose import empty_values, header_rules, preflight
from compose.campaign import CompiledCampaign
from compose.preflight import Finding
from compose.signing import DkimSigner, ParsedKeys, domains_of
from control.errors import FieldError, SeveralInvalid
from control.guards import Caller
from control.name_server import NameServer
from control.parameters import Id
from control.services import Services
from domain import dkim
from domain.campaign import CampaignContent, Recipient
from domain.dkim import DkimKey
from domain.egress import DeliveryServer
from domain.errors import Invalid
from domain.sender_domain import DomainFacts
from store import campaigns, egress, samples
from store import dkim as keys
from store.postgres import connection

COMPOSED = 20  # samples that are composed and looked at
COUNTED = 1000  # recipients for whom empty values are counted


class PreflightReport(msgspec.Struct, frozen=True, kw_only=True):
    """`ready`: nothing blocking was found. `samples`: how many messages were composed for it."""

    campaign_id: int
    ready: bool
    samples: int
    findings: list[Finding]


class PreflightController(Controller):
    """What would be refused."""

    path = "/campaigns/{campaign_id:int}/preflight"
    tags = ("campaigns",)

    @post("/", operation_id="preflightCampaign", summary="What providers would object to", status_code=200)
    async def run(self, campaign_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> PreflightReport:
        """Samples are composed for recipients all over the list, parsed, and held against the rules of Gmail, Yahoo and Microsoft;
        the DNS of From, return path, keys and link domains is asked. Each finding says who would answer with which code.

        Nothing is sent and nothing changes. Takes some seconds where name servers are slow.
        """
        async with connection(services.pool) as conn:
            await campaigns.get(conn, caller.sees, campaign_id)
        return await report(services, campaign_id, dns=True)


async def report(services: Services, campaign_id: int, *, dns: bool) -> PreflightReport:
    """Look at a campaign. Raises Invalid where its content cannot even be compiled."""
    async with connection(services.pool) as conn:
        content = await campaigns.content(conn, campaign_id)
        server = await egress.get(conn, content.user_id, content.delivery_server_id)
        people, known = await samples.of_list(conn, content.list_id, COUNTED), await samples.field_names(conn, content.list_id)
        operator = await keys.operator(conn)
    domains = domains_of(content, server, services.settings.mail)
    chosen, beside = domains.choose(await keys.active(services.pool, [content.user_id, operator], domains.names), operator)
    built = await asyncio.to_thread(_compose, services, content, server, [*chosen, *beside], _spread(people, COMPOSED))
    data = [msgspec.json.decode(each.data, type=dict[str, Any]) for each in people]
    findings = await asyncio.to_thread(preflight.content, content, built, data, known, domains.feedback)
    counted = await asyncio.to_thread(_count_empty, services, content, server, people)
    findings += empty_values.findings(counted, findings)
    if dns:
        wire = next((each for each in built if isinstance(each, bytes)), None)
        hosts = [host for host in _hosts(services, content, server) if host]
        name_server = NameServer(services.settings.preflight)
        sender, back = _sending_domains(services, content, server)
        facts, reply_to, records = await asyncio.gather(
            name_server.sender(sender, back, chosen, hosts),
            _reply_to(name_server, content, sender),
            asyncio.gather(*map(name_server.key, beside)),
        )
        facts = msgspec.structs.replace(facts, reply_to=reply_to, beside=tuple(records))
        findings += preflight.sender(facts, wire)
    findings.sort(key=lambda finding: finding.severity != "blocking")
    ready = not any(finding.severity == "blocking" for finding in findings)
    return PreflightReport(campaign_id=campaign_id, ready=ready, samples=len(built), findings=findings)


async def hold(services: Services, campaign_id: int) -> None:
    """What the start of a campaign asks. Raises SeveralInvalid with what is in its way."""
    when = services.settings.preflight.hold_start
    if when == "never":
        return
    found = await report(services, campaign_id, dns=when == "all")
    if not found.ready:
        blocking = [finding for finding in found.findings if finding.severity == "blocking"]
        reasons = [FieldError(f"preflight.{each.name}", f"{each.what}; {each.advice} (or start with force)") for each in blocking]
        raise SeveralInvalid(reasons)


def _spread(people: Sequence[Recipient], count: int) -> list[Recipient]:
    """Some of them, from all over the list."""
    step = max(1, len(people) // count)
    return list(people[::step])[:count]


def _compose(
    services: Services, content: CampaignContent, server: DeliveryServer, chosen: list[DkimKey], people: list[Recipient]
) -> list[bytes | Invalid]:
    settings = services.settings
    signer = _signer(services, chosen)
    compiled = CompiledCampaign(content, server, services.keyring, settings.inbound.public_url, signer, settings.mail)
    built = compiled.build(people, composed_at=time.time(), attempt=1)
    return [each if isinstance(each, Invalid) else each[2] for each in built]


def _count_empty(services: Services, content: CampaignContent, server: DeliveryServer, people: list[Recipient]) -> empty_values.Counted:
    settings = services.settings
    unsigned = CompiledCampaign(content, server, services.keyring, settings.inbound.public_url, None, settings.mail)
    return empty_values.count(unsigned, people, composed_at=time.time())


def _signer(services: Services, chosen: list[DkimKey]) -> DkimSigner | None:
    parsed = ParsedKeys()
    for key in chosen:
        try:
            parsed.add(key, services.keyring.open(key.private_key_sealed, dkim.seal_context(key.id)))
        except (Invalid, ValueError):
            continue  # an engine does without it, too; its record is asked for all the same
    return parsed.signer(chosen)


def _sending_domains(services: Services, content: CampaignContent, server: DeliveryServer) -> tuple[str, str]:
    """From domain and return-path domain, as A-labels."""
    mail = services.settings.mail
    field, address = header_rules.from_address(content, server)
    sender = header_rules.address_octets(field, address)[0].rpartition(b"@")[2].decode("ascii").lower()
    _, back = header_rules.mail_from(content, server, mail.sender_domain, mail.catch_all_domain)
    return sender, header_rules.domain_octets("mfrom", back.rpartition("@")[2]).decode("ascii").lower()


async def _reply_to(name_server: NameServer, content: CampaignContent, sender: str) -> DomainFacts | None:
    """What is said about the domain that answers go to; None where that is the sender's."""
    if not content.reply_to:
        return None
    domain = header_rules.address_octets("reply_to", content.reply_to)[0].rpartition(b"@")[2].decode("ascii").lower()
    return None if domain == sender else await name_server.domain(domain)


def _hosts(services: Services, content: CampaignContent, server: DeliveryServer) -> list[str]:
    """Where the links of its messages lead first."""
    own = urlsplit(services.settings.inbound.public_url).hostname or ""
    hosts = [server.link_domain or own]
    if content.track_opens:
        hosts.append(server.open_domain or server.link_domain or own)
    return [header_rules.domain_octets("link_domain", host).decode("ascii") for host in hosts if host and any(map(str.isalpha, host))]

"""Questions to the DNS with bounded waits: what pre-flight and the check of a DKIM record ask."""

import asyncio
from collections.abc import Iterable

import dns.asyncresolver
import dns.exception
import dns.name
import dns.rdatatype
import dns.resolver

from config.settings import Preflight
from domain.dkim import DkimKey
from domain.errors import Invalid
from domain.sender_domain import DomainFacts, KeyFacts, SenderFacts, parents

MAX_AT_ONCE = 20


class NameServer:
    """Answers as text. None: nobody said anything in time; an empty tuple: there is none."""

    def __init__(self, settings: Preflight) -> None:
        """Raises Invalid when `preflight.nameservers` holds something that is no address."""
        self._timeout = settings.timeout_seconds
        try:
            self._resolver = dns.asyncresolver.Resolver(configure=not settings.nameservers)
        except dns.resolver.NoResolverConfiguration:  # a machine without name servers: nobody answers
            self._resolver = dns.asyncresolver.Resolver(configure=False)
        self._resolver.lifetime = self._timeout
        self._gate = asyncio.Semaphore(MAX_AT_ONCE)
        if settings.nameservers:
            try:
                self._resolver.nameservers = [server.rpartition("@")[0] or server for server in settings.nameservers]
                self._resolver.nameserver_ports = {
                    server.partition("@")[0]: int(server.partition("@")[2]) for server in settings.nameservers if "@" in server
                }
            except ValueError as error:
                raise Invalid("preflight.nameservers", f"must be IP addresses, with @port behind where it is not 53: {error}") from None

    async def records(self, name: str, kind: str) -> tuple[str, ...] | None:
        """The records of one kind; a TXT record's strings are joined."""
        try:
            async with self._gate, asyncio.timeout(self._timeout + 1.0):
                answer = await self._resolver.resolve(name + ".", kind, search=False)
        except (dns.resolver.NXDOMAIN, dns.resolver.NoAnswer):
            return ()
        except (dns.exception.DNSException, OSError, TimeoutError, UnicodeError):
            return None
        if answer.rrset is None:
            return ()
        if kind == "TXT":
            return tuple(b"".join(record.strings).decode("utf-8", "replace") for record in answer)
        if kind == "MX":
            return tuple(str(record.exchange).rstrip(".") or "." for record in answer)
        return tuple(str(record) for record in answer)

    async def has_address(self, host: str) -> bool | None:
        """Whether it has an A or AAAA record."""
        four, six = await asyncio.gather(self.records(host, "A"), self.records(host, "AAAA"))
        return True if four or six else None if four is None or six is None else False

    async def domain(self, name: str) -> DomainFacts:
        """What is said about a domain that stands behind an @."""
        mx, txt, address, zones = await asyncio.gather(
            self.records(name, "MX"),
            self.records(name, "TXT"),
            self.has_address(name),
            asyncio.gather(*(self.records(zone, "SOA") for zone in parents(name))),
        )
        exists = True if any(zones) else None if None in zones else False
        return DomainFacts(name=name, exists=exists, mx=mx, has_address=address, txt=txt)

    async def key(self, key: DkimKey) -> KeyFacts:
        """Whether the record of a DKIM key is there."""
        found = await self.records(key.record_name, "TXT")
        return KeyFacts(name=key.record_name, domain=key.domain, bits=key.bits, expected=key.record, found=found)

    async def sender(self, sender: str, return_path: str, keys: Iterable[DkimKey], hosts: Iterable[str]) -> SenderFacts:
        """Everything about the domains of some mail; asked at once."""
        names, wanted = parents(sender), sorted(set(hosts))
        from_facts, back_facts, policies, key_facts, addresses = await asyncio.gather(
            self.domain(sender),
            self.domain(return_path),
            asyncio.gather(*(self.records(f"_dmarc.{name}", "TXT") for name in names)),
            asyncio.gather(*(self.key(key) for key in keys)),
            asyncio.gather(*(self.has_address(host) for host in wanted)),
        )
        at = next((i for i, texts in enumerate(policies) if texts is None or any(text.startswith("v") for text in texts)), 0)
        return SenderFacts(
            sender=from_facts,
            return_path=back_facts,
            dmarc_name=names[at],
            dmarc=policies[at],
            keys=tuple(key_facts),
            hosts=dict(zip(wanted, addresses, strict=True)),
        )

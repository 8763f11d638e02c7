"""A real DNS server for tests: UDP and TCP on loopback, answering from a table of zones."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

Table = Mapping[tuple[str, str], Sequence[str]]  # (name without final dot, type) -> records as in a zone file


class _Server(asyncio.DatagramProtocol):
    def __init__(self, table: Table, silent: frozenset[str]) -> None:
        self._table = table
        self._names = {name for name, _ in table}
        self._silent = silent
        self.asked: list[tuple[str, str]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is of no class of asyncio's

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        question = query.question[0]
        name, kind = str(question.name).rstrip(".").lower(), dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind))
        if name in self._silent:
            return
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.AA | dns.flags.RA
        if records := self._table.get((name, kind)):
            answer.answer.append(dns.rrset.from_text(question.name, 60, "IN", kind, *records))
        elif not any(known == name or known.endswith("." + name) for known in self._names):
            answer.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def serve(table: Table, silent: Sequence[str] = ()) -> AsyncIterator[str]:
    """A server on a free port; yields `address@port`. It never answers about `silent` names."""
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: _Server(table, frozenset(silent)), local_addr=("127.0.0.1", 0)
    )
    host, port = transport.get_extra_info("sockname")[:2]
    try:
        yield f"{host}@{port}"
    finally:
        transport.close()

"""The link between two processes, with faults on purpose: a proxy for byte streams that can be cut, stalled, slowed and made deaf.

One `Link` listens on a loopback port and passes every connection on to one target (TCP or Unix socket). Faults are switched while
connections are open. Bytes that were swallowed never come again, so a connection that lost some carries nothing any more (as behind
a firewall that forgot it) until `heal` resets it.
"""

import asyncio
import socket
import struct
from collections import deque
from typing import Final, cast

import msgspec

Target = str | tuple[str, int]  # path of a Unix socket, or host and port

_BUFFER: Final = 256 * 1024  # octets on their way to one side before the other is no longer read
_LINGER_RESET: Final = struct.pack("ii", 1, 0)


class Weather(msgspec.Struct, kw_only=True):
    """What a link does to its connections now."""

    refuse: bool = False  # nobody listens
    reset_new: bool = False  # a connection is reset as soon as it is accepted
    stalled: bool = False  # nothing is read on either side: windows fill up
    lose_up: bool = False  # what clients send is swallowed
    lose_down: bool = False  # what the target answers is swallowed
    delay_seconds: float = 0.0  # each direction
    octets_per_second: float = 0.0  # each direction of each connection; 0 = no limit


class Link:
    """One way to one target. `port` is where clients connect (127.0.0.1)."""

    def __init__(self, name: str, target: Target) -> None:
        self.name = name
        self.target = target
        self.weather = Weather()
        self.port = 0
        self.connections = 0  # accepted since the start
        self.swallowed = 0  # octets
        self._pairs: set[_Pair] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen; on the same port again after `refuse`."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Side(_Pair(self), None), "127.0.0.1", self.port, reuse_address=True, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the listener and reset every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self.reset()

    async def set(self, weather: Weather) -> None:
        """Change what happens to connections, the open ones included."""
        self.weather = weather
        if weather.refuse and self._server is not None:
            self._server.close()
            self._server = None
            await asyncio.sleep(0)
        if not weather.refuse and self._server is None:
            await self.start()
        for pair in self._pairs:
            pair.weather_changed()

    async def heal(self) -> None:
        """Fair weather again. Connections that lost octets are reset, as by a firewall that no longer knows them."""
        await self.set(Weather())
        for pair in list(self._pairs):
            if pair.deaf:
                pair.reset()

    def reset(self) -> int:
        """Reset (TCP RST) every open connection at this instant; returns how many there were."""
        pairs = list(self._pairs)
        for pair in pairs:
            pair.reset()
        return len(pairs)

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)


class _Pair:
    """One connection: the client's side and the target's side."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.client: _Side | None = None
        self.server: _Side | None = None
        self.deaf = False  # it lost octets
        self.gone = False
        self.early: list[bytes] = []  # what the client sent before the target was connected
        self._task: asyncio.Task[None] | None = None

    def accepted(self, client: "_Side") -> None:
        self.client = client
        self.link.connections += 1
        if self.link.weather.reset_new:
            self.reset()
            return
        self.link._pairs.add(self)
        self.weather_changed()
        self._task = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        loop, target = asyncio.get_running_loop(), self.link.target
        try:
            if isinstance(target, str):
                await loop.create_unix_connection(lambda: _Side(self, self.client), target)
            else:
                await loop.create_connection(lambda: _Side(self, self.client), *target)
        except OSError:
            self.reset()
            return
        self.weather_changed()

    def connected(self, server: "_Side") -> None:
        self.server = server
        # before anything else can arrive, so that the order stays
        for data in self.early:
            self.carry(data, up=True)
        self.early.clear()

    def carry(self, data: bytes, *, up: bool) -> None:
        weather = self.link.weather
        if self.deaf or (weather.lose_up if up else weather.lose_down):
            self.deaf = True
            self.link.swallowed += len(data)
            return
        other = self.server if up else self.client
        if other is None:
            self.early.append(data)
        elif weather.delay_seconds or weather.octets_per_second or other.late:
            other.write_later(data, weather)
        else:
            other.write(data)

    def ended(self, side: "_Side", error: Exception | None) -> None:
        """One side is gone: so is the other, unless the link swallows such news."""
        other = self.server if side is self.client else self.client
        if self.deaf and not self.gone:
            if other is None or other.closed:
                self.link._pairs.discard(self)
            return
        self.link._pairs.discard(self)
        if other is not None and not other.closed:
            if error is not None or self.gone:
                other.reset()
            else:
                other.close()
        elif other is None and self._task is not None:
            self._task.cancel()

    def weather_changed(self) -> None:
        for side in (self.client, self.server):
            if side is not None:
                side.read_or_not()

    def reset(self) -> None:
        """RST to both sides."""
        self.gone = True
        self.link._pairs.discard(self)
        for side in (self.client, self.server):
            if side is not None:
                side.reset()


class _Side(asyncio.Protocol):
    def __init__(self, pair: _Pair, client: "_Side | None") -> None:
        self._pair = pair
        self._is_client = client is None
        self._transport: asyncio.Transport | None = None
        self._full = False  # the other side must not be read
        self.closed = False
        self.late: deque[tuple[float, bytes]] = deque()  # due time and what is written then
        self._free_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._end_when_sent = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop has transports of its own
        self._transport = transport
        transport.set_write_buffer_limits(high=_BUFFER)
        if self._is_client:
            self._pair.accepted(self)
        elif self._pair.gone:
            self.reset()
        else:
            self._pair.connected(self)

    def data_received(self, data: bytes) -> None:
        self._pair.carry(data, up=self._is_client)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._pair.ended(self, error)

    def pause_writing(self) -> None:
        self._full = True
        self._pair.weather_changed()

    def resume_writing(self) -> None:
        self._full = False
        self._pair.weather_changed()

    def read_or_not(self) -> None:
        """Read unless the link is stalled or the other side has too much on its way."""
        if self.closed or self._transport is None or self._transport.is_closing():
            return
        other = self._pair.server if self._is_client else self._pair.client
        if self._pair.link.weather.stalled or (other is not None and other._full):
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self.closed:
            self._transport.write(data)

    def write_later(self, data: bytes, weather: Weather) -> None:
        now = asyncio.get_running_loop().time()
        start = max(self._free_at, now)
        self._free_at = start + (len(data) / weather.octets_per_second if weather.octets_per_second else 0.0)
        due = self._free_at + weather.delay_seconds
        if self.late:
            due = max(due, self.late[-1][0])
        self.late.append((due, data))
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_at(due, self._write_due)
        if weather.octets_per_second and len(self.late) > 64 and not self._full:
            self.pause_writing()

    def _write_due(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self.late and self.late[0][0] <= loop.time() + 0.0005:
            self.write(self.late.popleft()[1])
        if self.late:
            self._timer = loop.call_at(self.late[0][0], self._write_due)
        elif self._end_when_sent:
            self.close()
        if self._full and len(self.late) < 32 and self._transport is not None and self._transport.get_write_buffer_size() < _BUFFER:
            self.resume_writing()

    def close(self) -> None:
        """FIN, after what is still on its way."""
        if self.late:
            self._end_when_sent = True
        elif self._transport is not None and not self.closed:
            self._transport.close()

    def reset(self) -> None:
        """RST."""
        if self._transport is None or self.closed:
            return
        link = self._transport.get_extra_info("socket")
        if link is not None and link.family != socket.AF_UNIX:
            link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
        self._transport.abort()

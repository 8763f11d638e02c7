"""The listener on a real socket, and a client that does exactly what it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from inbound.door import Door, Patience
from inbound.listener import Listener
from inbound.policy import MailPolicy
from inbound.session import Limits
from store.postgres import Pool
from tests.inbound.conftest import World

BODY = b"From: MAILER-DAEMON@mx.example\r\nSubject: failed\r\n\r\nhello\r\n"
QUICK = Patience(greeting=0.03, idle=5.0, session=30.0, content=5.0)
LIMIT = 200_000


class Client:
    """A client that does exactly what it is told."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        """Octets, as they are."""
        self.writer.write(data)

    async def reply(self) -> str:
        """One reply, its lines joined; "" when the server has closed."""
        lines = []
        while True:
            try:
                async with asyncio.timeout(60):  # wait_for of Python 3.11 may swallow that whoever waits is cancelled
                    line = (await self.reader.readline()).decode()
            except ConnectionResetError:
                return ""
            if not line:
                return ""
            assert line.endswith("\r\n")
            lines.append(line.rstrip())
            if line[3:4] != "-":
                return " ".join(lines)

    async def say(self, line: str | bytes) -> str:
        """A line, and the reply to it."""
        self.send((line if isinstance(line, bytes) else line.encode("utf-8", "surrogateescape")) + b"\r\n")
        return await self.reply()

    async def rest(self) -> list[str]:
        """Every reply until the server closes."""
        replies = []
        while reply := await self.reply():
            replies.append(reply)
        return replies

    async def deliver(self, recipient: str, content: bytes = BODY, sender: str = "") -> str:
        """A whole transaction; the reply to its end."""
        assert (await self.say(f"MAIL FROM:<{sender}>")).startswith("250")
        assert (await self.say(f"RCPT TO:<{recipient}>")).startswith("250")
        assert (await self.say("DATA")).startswith("354")
        return await self.say(content + b".")


class Server:
    """The listener under test, on a store."""

    def __init__(self, pool: Pool, world: World, patience: Patience = QUICK, connections: int = 200, **options: Any) -> None:
        self.policy = MailPolicy(pool, world.keyring, ("relay.example",), hostname="mx.mailer.example")
        door = Door("mx.mailer.example", LIMIT)._replace(**options)
        self.listener = Listener(self.policy, Limits(connections, patience), door, host="127.0.0.1", port=0)
        self.clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_connection(*self.listener.address))
        self.clients.append(client)
        return client

    async def greeted(self) -> Client:
        client = await self.connect()
        assert (await client.reply()).startswith("220 mx.mailer.example")
        assert (await client.say("EHLO mx.example")).startswith("250-")
        return client

    async def stop(self) -> None:
        for client in self.clients:
            client.writer.close()
        await self.listener.stop()


@asynccontextmanager
async def serving(pool: Pool, world: World, **options: Any) -> AsyncIterator[Server]:
    """The listener, running."""
    made = Server(pool, world, **options)
    await made.policy.refresh()
    await made.listener.start()
    try:
        yield made
    finally:
        await made.stop()


async def stored(pool: Pool) -> list[Any]:
    """What was kept, in order."""
    return await pool.fetch("select * from inbound_messages order by id")

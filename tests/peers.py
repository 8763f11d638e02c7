"""A scripted SMTP server for tests: it answers like an honest one except where its script says otherwise.

    async with Peer(offers=("PIPELINING",), script={"rcpt": ["250 2.1.5 Ok", "550 5.1.1 no such user"], "content": (DROP,)}) as peer:
        ... connect to peer.port ...
        assert [m.rcpt for m in peer.accepted] == [...]

Stages: banner, ehlo, helo, starttls, auth, mail, rcpt, data, body (once, when the first content octets arrive), content (the
dot), bdat, rset, noop, quit. A script gives for a stage either one step for every occurrence or a list of steps, one for each
occurrence in turn; None, and whatever is past the end of a list, is the honest answer. A step is a reply (str: CRLF is added;
bytes: sent as they are), an action, or a tuple of these. `recipients` gives steps for single addresses at RCPT.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, Self


class Action:
    """What a peer can do besides answering."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


DROP: Final = Action("DROP")  # close the connection (what was answered before still goes out)
RESET: Final = Action("RESET")  # close it with a TCP reset
HANG: Final = Action("HANG")  # say nothing more, ever, but go on reading
STALL: Final = Action("STALL")  # stop reading: the window closes
ACCEPT: Final = Action("ACCEPT")  # take the message without saying so
HONEST: Final = Action("HONEST")  # the honest answer, as part of a tuple

Step = str | bytes | Action | tuple["str | bytes | Action", ...] | None
Script = Mapping[str, "Step | list[Step]"]


@dataclass
class Accepted:
    """A message the peer took responsibility for."""

    mail_from: str
    rcpts: list[str]
    content: bytes
    connection: int

    @property
    def rcpt(self) -> str:
        return self.rcpts[0]


@dataclass
class Peer:
    """The server. `accepted` and `commands` grow as it works; `chunks` are the reads as they came, per connection."""

    offers: Sequence[str] = ("PIPELINING", "8BITMIME", "SMTPUTF8", "ENHANCEDSTATUSCODES")
    script: Script = field(default_factory=dict)
    recipients: Mapping[str, Step] = field(default_factory=dict)
    reply_delay: float = 0.0  # seconds until each reply leaves; replies stay in order
    piece: int = 0  # octets per segment of what it says; 0: as they come
    context: ssl.SSLContext | None = None
    implicit_tls: bool = False
    user: str = "user"
    password: str = "secret"
    port: int = 0
    accepted: list[Accepted] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    chunks: list[list[bytes]] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)  # what the client did wrong
    open: int = 0

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._used: dict[str, int] = {}
        self._connections: set[_Connection] = set()
        context = self.context if self.implicit_tls else None
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port, ssl=context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.close()
        for connection in list(self._connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    def step(self, stage: str) -> Step:
        """The next step of this stage's script."""
        steps = self.script.get(stage)
        if not isinstance(steps, list):
            return steps
        at = self._used.get(stage, 0)
        self._used[stage] = at + 1
        return steps[at] if at < len(steps) else None

    def say_now(self, data: bytes) -> None:
        """Say something on every open connection, asked or not."""
        for connection in list(self._connections):
            connection.say(data)

    def drop_now(self) -> None:
        """Close every open connection."""
        for connection in list(self._connections):
            connection.transport.close()


class _Connection(asyncio.Protocol):
    transport: Any

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.buffer = bytearray()
        self.outgoing = bytearray()
        self.hung = False
        self.dropping = False
        self.tls = peer.implicit_tls
        self.challenge: Callable[[bytes], None] | None = None
        self.in_data = False
        self.bdat_left = -1
        self.bdat_last = False
        self.content = bytearray()
        self.body_seen = False
        self.pumping = False
        self.number = -1
        self.reset()

    def reset(self) -> None:
        self.mail_from: str | None = None
        self.rcpts: list[str] = []
        self.content = bytearray()
        self.body_seen = False

    # --- transport ----------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self.number >= 0:
            return  # the same connection, now with TLS
        self.number = len(self.peer.chunks)
        self.peer.chunks.append([])
        self.peer.open += 1
        self.peer._connections.add(self)
        self.play("banner", "220 peer.example ESMTP")

    def connection_lost(self, exc: Exception | None) -> None:
        self.peer.open -= 1
        self.peer._connections.discard(self)

    def data_received(self, data: bytes) -> None:
        self.peer.chunks[self.number].append(data)
        if self.hung or self.dropping:
            return
        self.buffer += data
        while not self.hung and not self.dropping and self.advance():
            pass

    def say(self, data: bytes) -> None:
        if not self.peer.reply_delay and not self.peer.piece:
            self.transport.write(data)
        elif self.peer.piece:
            self.outgoing += data
            self.pump()
        else:
            asyncio.get_running_loop().call_later(self.peer.reply_delay, self.transport.write, data)

    def pump(self) -> None:
        if self.outgoing and not self.pumping:
            self.pumping = True
            asyncio.get_running_loop().call_later(0.0001, self._pump)

    def _pump(self) -> None:
        self.pumping = False
        self.transport.write(bytes(self.outgoing[: self.peer.piece]))
        del self.outgoing[: self.peer.piece]
        self.pump()

    # --- script -------------------------------------------------------------------------------------------------------
    def play(self, stage: str, honest: str, step: Step = None) -> bool:
        """Do what the script says at `stage`; tell whether the client was given a 2xx or 3xx."""
        step = step if step is not None else self.peer.step(stage)
        steps = step if isinstance(step, tuple) else (honest,) if step is None else (step,)
        positive = False
        for part in steps:
            if part is HONEST:
                part = honest
            if isinstance(part, str):
                self.say(part.encode() + b"\r\n")
                positive = positive or part[:1] in ("2", "3")
            elif isinstance(part, bytes):
                self.say(part)
                positive = positive or part[:1] in (b"2", b"3")
            elif part is DROP:
                self.dropping = True
                asyncio.get_running_loop().call_later(self.peer.reply_delay * 1.5, self.transport.close)
            elif part is RESET:
                self.dropping = True
                self.transport.get_extra_info("socket").setsockopt(1, 13, b"\x01\0\0\0\0\0\0\0")  # SO_LINGER 0
                self.transport.abort()
            elif part is HANG:
                self.hung = True
            elif part is STALL:
                self.hung = True
                self.transport.pause_reading()
            elif part is ACCEPT:
                self.take()
        return positive

    def take(self) -> None:
        self.peer.accepted.append(Accepted(self.mail_from or "", list(self.rcpts), bytes(self.content), self.number))

    # --- commands -----------------------------------------------------------------------------------------------------
    def advance(self) -> bool:
        if self.bdat_left >= 0:
            part = bytes(self.buffer[: self.bdat_left])
            self.content += part
            del self.buffer[: len(part)]
            self.bdat_left -= len(part)
            if self.bdat_left:
                return False
            self.bdat_left = -1
            if not self.rcpts:
                self.play("bdat", "503 5.5.1 no recipients")
                self.content.clear()
            elif not self.bdat_last:
                self.play("bdat", "250 2.0.0 chunk taken")
            else:
                self.finish("bdat")
            return True
        if self.in_data:
            if not self.body_seen and self.buffer:
                self.body_seen = True
                if self.peer.script.get("body") is not None:
                    self.play("body", "")
                    if self.hung or self.dropping:
                        return False
            if self.buffer.startswith(b".\r\n"):
                end, skip = 0, 3
            else:
                at = self.buffer.find(b"\r\n.\r\n")
                if at < 0:
                    return False
                end, skip = at + 2, 3
            self.content = bytearray(self.buffer[:end].replace(b"\r\n..", b"\r\n."))
            del self.buffer[: end + skip]
            self.in_data = False
            if self.rcpts:
                self.finish("content")
            else:
                self.play("content", "554 5.5.1 no valid recipients")
                self.reset()
            return True
        at = self.buffer.find(b"\n")
        if at < 0:
            return False
        line = bytes(self.buffer[: at + 1])
        del self.buffer[: at + 1]
        if not line.endswith(b"\r\n"):
            self.peer.violations.append(f"bare LF: {line!r}")
        self.command(line[:-2])
        return True

    def finish(self, stage: str) -> None:
        step = self.peer.step(stage)
        count = len(self.peer.accepted) + 1
        honest = f"250 2.0.0 queued as {count}"
        parts = step if isinstance(step, tuple) else (step,)
        first = next((p for p in parts if not isinstance(p, Action) or p is HONEST), HANG)
        if step is None or first is HONEST or (isinstance(first, str | bytes) and first[:1] in ("2", b"2")):
            self.take()
        self.play(stage, honest, HONEST if step is None else step)
        self.reset()

    def command(self, line: bytes) -> None:
        if self.challenge is not None:
            answer, self.challenge = self.challenge, None
            answer(line)
            return
        text = line.decode("utf-8", "replace")
        self.peer.commands.append(text)
        verb, _, rest = text.partition(" ")
        verb = verb.upper()
        if verb == "EHLO":
            words = [w for w in self.peer.offers if not (w.upper() == "STARTTLS" and self.tls)]
            lines = ["peer.example", *words]
            self.play("ehlo", "\r\n".join(f"250-{w}" for w in lines[:-1]) + ("\r\n" if words else "") + f"250 {lines[-1]}")
            self.reset()
        elif verb == "HELO":
            self.play("helo", "250 peer.example")
        elif verb == "STARTTLS":
            if self.play("starttls", "220 2.0.0 go ahead") and not self.dropping and self.peer.context is not None:
                self.hung = True
                asyncio.get_running_loop().create_task(self.upgrade())
        elif verb == "AUTH":
            self.auth(rest)
        elif verb == "MAIL":
            if self.mail_from is not None:
                self.peer.violations.append("nested MAIL")
                self.say(b"503 5.5.1 nested MAIL\r\n")
            elif self.play("mail", "250 2.1.0 sender ok"):
                self.mail_from = rest[rest.find("<") + 1 : rest.find(">")]
        elif verb == "RCPT":
            address = rest[rest.find("<") + 1 : rest.find(">")]
            if self.mail_from is None:
                self.say(b"503 5.5.1 MAIL first\r\n")
            elif self.play("rcpt", "250 2.1.5 recipient ok", self.peer.recipients.get(address)):
                self.rcpts.append(address)
        elif verb == "DATA":
            if not self.rcpts and "data" not in self.peer.script:
                self.say(b"503 5.5.1 RCPT first\r\n")
            elif self.play("data", "354 go ahead"):
                self.in_data = True
        elif verb == "BDAT":
            words = rest.split()
            self.bdat_left, self.bdat_last = int(words[0]), words[1:] == ["LAST"]
        elif verb == "RSET":
            self.play("rset", "250 2.0.0 flushed")
            self.reset()
        elif verb == "NOOP":
            self.play("noop", "250 2.0.0 ok")
        elif verb == "QUIT":
            self.play("quit", "221 2.0.0 bye")
            if not self.hung:
                self.play("quit", "", DROP)
        else:
            self.peer.violations.append(f"unknown command {text!r}")
            self.say(b"500 5.5.2 unknown command\r\n")

    async def upgrade(self) -> None:
        loop = asyncio.get_running_loop()
        assert self.peer.context is not None
        try:
            transport = await loop.start_tls(self.transport, self, self.peer.context, server_side=True, ssl_handshake_timeout=5.0)
        except (OSError, TimeoutError):
            return
        self.transport, self.tls, self.hung = transport, True, False
        self.reset()

    def auth(self, rest: str) -> None:
        import base64

        def check(pair: tuple[str, str]) -> None:
            good = pair == (self.peer.user, self.peer.password)
            self.play("auth", "235 2.7.0 welcome" if good else "535 5.7.8 authentication credentials invalid")

        mechanism, _, initial = rest.partition(" ")
        if mechanism.upper() == "PLAIN":
            _, user, password = base64.b64decode(initial).decode().split("\0")
            check((user, password))
        elif mechanism.upper() == "LOGIN":
            user = base64.b64decode(initial).decode()
            self.challenge = lambda line: check((user, base64.b64decode(line).decode()))
            self.say(b"334 UGFzc3dvcmQ6\r\n")
        else:
            self.say(b"504 5.5.4 unknown mechanism\r\n")

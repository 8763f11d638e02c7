"""A small POP3 and IMAP server for tests: true to the protocols as far as it goes, and able to fail where it is told to.

Messages live in one list; both protocols delete as real servers do: POP3 at QUIT, IMAP at EXPUNGE.
"""

import asyncio
import base64
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

USER, PASSWORD = "bounce@mailer.example", 'p"ass\\wörd'


class MailStoreServer:
    """One mailbox. `break_at` ends the connection when a command that begins so is given."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.messages: dict[int, bytes] = {}
        self.next = 1
        self.validity = 7
        self.commands: list[str] = []
        self.break_at = ""
        self.tls = tls
        self.offers = "IMAP4rev1 AUTH=PLAIN IDLE UIDPLUS"
        self.news = asyncio.Event()
        self.sessions = 0
        self.ports: dict[str, int] = {}

    def add(self, message: bytes) -> int:
        """One more message; its UID."""
        self.messages[self.next] = message
        self.next += 1
        self.news.set()
        return self.next - 1

    async def _line(self, reader: asyncio.StreamReader) -> str:
        line = (await reader.readuntil(b"\r\n")).decode().rstrip("\r\n")
        self.commands.append(line)
        if self.break_at and self.break_at in line:
            raise ConnectionResetError
        return line

    async def pop3(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One POP3 session."""
        numbers = dict(enumerate(sorted(self.messages), 1))
        marked: set[int] = set()
        user = ""

        def say(text: str) -> None:
            writer.write(text.encode() + b"\r\n")

        say("+OK ready")
        while True:
            word, _, rest = (await self._line(reader)).partition(" ")
            if word == "STLS" and self.tls is not None:
                say("+OK begin")
                await writer.start_tls(self.tls)
            elif word == "USER":
                user = rest
                say("+OK")
            elif word == "PASS":
                say("+OK" if (user, rest) == (USER, PASSWORD) else "-ERR [AUTH] no")
            elif word in ("UIDL", "LIST"):
                say("+OK")
                for number, uid in numbers.items():
                    say(f"{number} {f'u{uid}.{self.validity}' if word == 'UIDL' else len(self.messages[uid])}")
                say(".")
            elif word == "RETR":
                body = self.messages[numbers[int(rest)]]
                say("+OK")
                stuffed = re.sub(rb"^\.", b"..", body, flags=re.MULTILINE)
                writer.write(stuffed + (b"" if stuffed.endswith(b"\r\n") else b"\r\n") + b".\r\n")
            elif word == "DELE":
                marked.add(numbers[int(rest)])
                say("+OK")
            elif word == "QUIT":
                for uid in marked:
                    del self.messages[uid]
                say("+OK bye")
                return
            else:
                say("-ERR what")

    async def imap(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One IMAP session."""
        marked: set[int] = set()

        def say(text: str) -> None:
            writer.write(text.encode() + b"\r\n")

        say("* OK [CAPABILITY IMAP4rev1] ready")
        while True:
            tag, word, *rest = (await self._line(reader)).split(" ")
            command = " ".join([word, *rest])
            if word == "CAPABILITY":
                say(f"* CAPABILITY {self.offers}{' STARTTLS' if self.tls else ''}")
            elif word == "STARTTLS" and self.tls is not None:
                say(f"{tag} OK begin")
                await writer.start_tls(self.tls)
                continue
            elif word == "AUTHENTICATE":
                say("+ ")
                if base64.b64decode(await self._line(reader)).decode() != f"\0{USER}\0{PASSWORD}":
                    say(f"{tag} NO [AUTHENTICATIONFAILED] no")
                    continue
            elif word == "LOGIN":
                say(f"{tag} NO plain only")
                continue
            elif word == "SELECT":
                say(f"* {len(self.messages)} EXISTS")
                say(f"* OK [UIDVALIDITY {self.validity}] UIDs valid")
            elif command.startswith("UID FETCH 1:*"):
                for number, uid in enumerate(sorted(self.messages), 1):
                    say(f"* {number} FETCH (UID {uid} RFC822.SIZE {len(self.messages[uid])})")
            elif command.startswith("UID FETCH"):
                uid = int(rest[1])
                say(f"* {sorted(self.messages).index(uid) + 1} FETCH (UID {uid} BODY[] {{{len(self.messages[uid])}}}")
                writer.write(self.messages[uid] + b")\r\n")
            elif command.startswith("UID STORE"):
                marked |= {int(uid) for uid in rest[1].split(",")}
            elif command.startswith(("UID EXPUNGE", "EXPUNGE")):
                for uid in marked & set(self.messages):
                    say(f"* {sorted(self.messages).index(uid) + 1} EXPUNGE")
                    del self.messages[uid]
            elif word == "IDLE":
                self.news.clear()
                say("+ idling")
                waiting = asyncio.create_task(self.news.wait())
                done = asyncio.create_task(self._line(reader))
                await asyncio.wait([waiting, done], return_when=asyncio.FIRST_COMPLETED)
                if not done.done():
                    say(f"* {len(self.messages)} EXISTS")
                waiting.cancel()
                await done
            elif word == "LOGOUT":
                say("* BYE")
                say(f"{tag} OK")
                return
            else:
                say(f"{tag} BAD what")
                continue
            say(f"{tag} OK done")


@asynccontextmanager
async def mail_store(tls: ssl.SSLContext | None = None, implicit: ssl.SSLContext | None = None) -> AsyncIterator[MailStoreServer]:
    """Both servers on free ports. `tls`: STARTTLS is offered; `implicit`: TLS from the start."""
    made = MailStoreServer(tls)
    servers = []
    for name, serve in (("pop3", made.pop3), ("imap", made.imap)):

        async def session(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, serve: object = serve) -> None:
            made.sessions += 1
            try:
                await serve(reader, writer)  # type: ignore[operator]
            except (OSError, EOFError):
                pass
            finally:
                made.sessions -= 1
                writer.close()

        server = await asyncio.start_server(session, "127.0.0.1", 0, ssl=implicit)
        made.ports[name] = server.sockets[0].getsockname()[1]
        servers.append(server)
    yield made
    for server in servers:
        server.close()

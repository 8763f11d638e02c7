"""IMAP4rev1 (RFC 3501, IDLE of RFC 2177, UIDPLUS of RFC 4315): one session over one folder."""

import base64
import re

from inbound.mailbox_link import MAX_LISTED, Link

_LITERAL = re.compile(rb"\{(\d{1,12})\+?\}$")
_FETCHED = re.compile(rb"^\* \d+ FETCH \(.*?\bUID (\d+)\b", re.DOTALL)
_SIZE = re.compile(rb"\bRFC822\.SIZE (\d+)")
_NOTHING = re.compile(rb'\bBODY\[\] (?:""|NIL|(?=[ )]))', re.IGNORECASE)  # a message of no octets, its literal taken out
_UIDVALIDITY = re.compile(rb"\[UIDVALIDITY (\d+)\]", re.IGNORECASE)
_AT_ONCE = 200  # UIDs in one command: command lines are limited, too


class Imap(Link):
    """One session. Identifiers are `UIDVALIDITY.UID`."""

    idles = False

    async def open(self, password: str) -> None:
        """Connect, sign in, select the folder. Raises MailboxTrouble."""
        await self.connect()
        self._tags = 0
        self._validity = ""
        self._offers: set[str] = set()
        greeting = await self.answer()
        if not greeting.startswith((b"* OK", b"* PREAUTH")):
            raise self.refused("the connection", greeting)
        await self._capabilities()
        if self.mailbox.tls == "starttls":
            if "STARTTLS" not in self._offers:
                raise self.trouble("the server does not offer STARTTLS; use imaps, or allow plain text with ?tls=none")
            await self._command("STARTTLS")
            await self.start_tls()
            await self._capabilities()
        if not greeting.startswith(b"* PREAUTH"):
            await self._sign_in(password)
            await self._capabilities()
        self.idles = "IDLE" in self._offers
        for line, _ in await self._command(f'SELECT "{self.mailbox.folder}"'):
            if found := _UIDVALIDITY.search(line):
                self._validity = found[1].decode()
        if not self._validity:
            raise self.trouble("the server gives no UIDVALIDITY, so messages cannot be told apart")

    async def _capabilities(self) -> None:
        for line, _ in await self._command("CAPABILITY"):
            if line.upper().startswith(b"* CAPABILITY "):
                self._offers = set(line.decode("ascii", "replace").upper().split()[2:])

    async def _sign_in(self, password: str) -> None:
        user = self.mailbox.user
        if "AUTH=PLAIN" in self._offers:
            tag = await self._start("AUTHENTICATE PLAIN")
            reply = await self.answer()
            if not reply.startswith(b"+"):
                raise self.refused("AUTHENTICATE", reply)
            await self.send(base64.b64encode(f"\0{user}\0{password}".encode()) + b"\r\n")
            await self._responses(tag, "AUTHENTICATE")
            return
        words = [user, password]
        if not all(word.isascii() and word.isprintable() for word in words):
            raise self.trouble("the user name or password has characters that this server takes no way of")
        quoted = ['"' + re.sub(r'(["\\])', r"\\\1", word) + '"' for word in words]
        await self._command(f"LOGIN {quoted[0]} {quoted[1]}", shown="LOGIN")

    async def _start(self, line: str) -> bytes:
        self._tags += 1
        tag = b"s%d" % self._tags
        await self.send(tag + b" " + line.encode() + b"\r\n")
        return tag

    async def _command(self, line: str, shown: str = "", max_bytes: int = 0) -> list[tuple[bytes, bytes]]:
        """The untagged answers to a command, each with the last literal in it. Raises MailboxTrouble when it is refused."""
        return await self._responses(await self._start(line), shown or line.split(" ", 1)[0], max_bytes)

    async def _responses(self, tag: bytes, shown: str, max_bytes: int = 0) -> list[tuple[bytes, bytes]]:
        found: list[tuple[bytes, bytes]] = []
        while True:
            line, literal = await self._response(max_bytes)
            if line.startswith(tag + b" "):
                if not line[len(tag) + 1 :].upper().startswith(b"OK"):
                    raise self.refused(shown, line[len(tag) + 1 :])
                return [*found, (line, b"")]
            if line.startswith(b"* BYE"):
                raise self.refused(shown, line)
            if len(found) < MAX_LISTED:
                found.append((line, literal))

    async def _response(self, max_bytes: int) -> tuple[bytes, bytes]:
        line, literal = await self.answer(), b""
        while size := _LITERAL.search(line):
            if int(size[1]) > max(max_bytes + max_bytes // 8, 65536):
                raise self.trouble(f"the server sent {int(size[1])} bytes where fewer were announced")
            literal = await self.exactly(int(size[1]))
            line = line[: size.start()] + await self.answer()
        return line, literal

    async def messages(self) -> dict[str, int]:
        """UID and size. Raises MailboxTrouble."""
        found = {}
        for line, _ in await self._command("UID FETCH 1:* (UID RFC822.SIZE)"):
            uid, size = _FETCHED.search(line), _SIZE.search(line)
            if uid and size:
                found[int(uid[1])] = int(size[1])
        return {f"{self._validity}.{uid}": found[uid] for uid in sorted(found)}

    async def fetch(self, uid: str, max_bytes: int) -> bytes:
        """One message; it does not become read by that. Raises MailboxTrouble."""
        number = uid.rpartition(".")[2]
        for line, literal in await self._command(f"UID FETCH {number} BODY.PEEK[]", "FETCH", max_bytes):
            known = _FETCHED.search(line)
            if known and known[1].decode() == number and (literal or _NOTHING.search(line)):
                return literal
        raise self.trouble(f"message {uid} was listed and is not there")

    async def discard(self, uids: list[str]) -> None:
        """Delete and expunge, nobody else's where the server can tell them apart. Raises MailboxTrouble."""
        numbers = [uid.rpartition(".")[2] for uid in uids]
        for start in range(0, len(numbers), _AT_ONCE):
            some = ",".join(numbers[start : start + _AT_ONCE])
            await self._command(f"UID STORE {some} +FLAGS.SILENT (\\Deleted)", "STORE")
            await self._command(f"UID EXPUNGE {some}" if "UIDPLUS" in self._offers else "EXPUNGE")

    async def wait(self, seconds: float) -> None:
        """IDLE until the server says that there is more, at most so long. Raises MailboxTrouble."""
        tag = await self._start("IDLE")
        reply = await self.answer()
        if not reply.startswith(b"+"):
            raise self.refused("IDLE", reply)
        try:
            while True:
                line = await self.line(seconds)
                if line.startswith(b"* BYE"):
                    raise self.refused("IDLE", line)
                if line.upper().endswith((b" EXISTS", b" RECENT")):
                    break
        except TimeoutError:
            pass
        await self.send(b"DONE\r\n")
        await self._responses(tag, "IDLE")

    async def close(self) -> None:
        """Say goodbye. Raises MailboxTrouble."""
        tag = await self._start("LOGOUT")
        while not (line := await self.answer()).startswith(tag):
            if not line.startswith(b"*"):
                break
        self.abort()

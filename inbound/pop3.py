"""POP3 (RFC 1939, STLS of RFC 2595, UIDL): one session over one mailbox."""

import asyncio

from inbound.mailbox_link import MAX_LISTED, Link

_END = b"\r\n.\r\n"


class Pop3(Link):
    """One session. What is discarded is gone when `close` was answered."""

    idles = False

    async def open(self, password: str) -> None:
        """Connect and sign in. Raises MailboxTrouble."""
        await self.connect()
        self._numbers: dict[str, int] = {}
        greeting = await self.answer()
        if not greeting.startswith(b"+OK"):
            raise self.refused("the connection", greeting)
        if self.mailbox.tls == "starttls":
            await self._command("STLS")
            await self.start_tls()
        await self._command(f"USER {self.mailbox.user}")
        await self._command(f"PASS {password}", shown="PASS")

    async def _command(self, line: str, shown: str = "") -> bytes:
        await self.send(line.encode() + b"\r\n")
        reply = await self.answer()
        if not reply.startswith(b"+OK"):
            raise self.refused(shown or line, reply)
        return reply

    async def _listing(self, command: str) -> list[tuple[int, str]]:
        await self._command(command)
        found: list[tuple[int, str]] = []
        while (line := await self.answer()) != b".":
            number, _, word = line.partition(b" ")
            if not number.isdigit() or not word.strip():
                raise self.trouble(f"the answer to {command} cannot be read")
            if len(found) < MAX_LISTED:
                found.append((int(number), word.strip().decode("latin-1")))
        return found

    async def messages(self) -> dict[str, int]:
        """UIDL and size. Raises MailboxTrouble."""
        uids = await self._listing("UIDL")
        sizes = dict(await self._listing("LIST"))
        self._numbers = {uid: number for number, uid in uids}
        return {uid: int(size) if (size := sizes.get(number, "0").split()[0]).isdigit() else 0 for number, uid in uids}

    async def fetch(self, uid: str, max_bytes: int) -> bytes:
        """One message, dots unstuffed. Raises MailboxTrouble."""
        await self._command(f"RETR {self._numbers[uid]}")
        found = bytearray(b"\r\n")  # so that a lone dot in the first line is found like any other
        while True:
            searched = max(0, len(found) - len(_END))
            found += await self.some()
            end = found.find(_END, searched)
            if end >= 0:
                break
            if len(found) > max_bytes + max_bytes // 8:
                raise self.trouble(f"message {uid} is larger than the server said")
        if end + len(_END) != len(found):
            raise self.trouble("the server sent more than one message")
        return bytes(found[: end + 2]).replace(b"\r\n.", b"\r\n")[2:]

    async def discard(self, uids: list[str]) -> None:
        """Mark for deletion. Raises MailboxTrouble."""
        for uid in uids:
            await self._command(f"DELE {self._numbers[uid]}")

    async def wait(self, seconds: float) -> None:
        """POP3 tells nothing: a new session has to look."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """End the session, which is what deletes. Raises MailboxTrouble."""
        await self._command("QUIT")
        self.abort()

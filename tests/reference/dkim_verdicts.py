"""What an independent verifier (dkimpy) says of a message's signatures."""

from collections.abc import Mapping

import dkim


def verdicts(message: bytes, records: Mapping[str, str]) -> list[bool]:
    """One verdict per DKIM-Signature field, from the top; `records` are TXT records by name. Unreadable signatures count as false."""

    def lookup(name: bytes, timeout: int = 5) -> bytes | None:
        text = records.get(name.decode().rstrip("."))
        return None if text is None else text.encode()

    found = []
    count = sum(line.lower().startswith(b"dkim-signature:") for line in message.partition(b"\r\n\r\n")[0].split(b"\r\n"))
    for at in range(count):
        try:
            found.append(bool(dkim.DKIM(message).verify(idx=at, dnsfunc=lookup)))
        except dkim.DKIMException:
            found.append(False)
    return found

"""`python -m inbound.pipe`: one message on standard input, kept as if it had come by SMTP (`sluice inbound pipe`).

The exit code is the answer, in the words of sysexits.h that MTAs know. Whatever is our own trouble is 75, so that the MTA keeps the mail.
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path
from typing import Final

from config import load, logs
from config.keys import load_keyring
from config.settings import Settings
from domain.errors import SluiceError
from inbound.content import refusal, sender_of, with_crlf
from inbound.policy import STORE_TIMEOUT_SECONDS, MailPolicy
from store import embedded, inbound, postgres

STORED: Final = 0
REFUSED: Final = 65  # EX_DATAERR
NO_USER: Final = 67  # EX_NOUSER
NOT_NOW: Final = 75  # EX_TEMPFAIL
TOTAL_TIMEOUT_SECONDS: Final = 4 * STORE_TIMEOUT_SECONDS


async def keep(settings: Settings, message: bytes, sender: str | None, recipients: list[str]) -> tuple[int, str]:
    """(exit code, what to say). Raises Unavailable, ConfigurationError."""
    if not message.strip():
        return REFUSED, "there was no message on standard input"
    if len(message) > settings.inbound.max_message_bytes:
        return REFUSED, f"the message is larger than inbound.max_message_bytes ({settings.inbound.max_message_bytes})"
    message = with_crlf(message)
    loop = refusal(b"\r\n" + message)
    if loop.startswith("554"):  # what else SMTP would refuse was taken by the MTA before us
        return REFUSED, loop
    pool = await postgres.open_pool(settings.database.url, 2, STORE_TIMEOUT_SECONDS)
    try:
        policy = MailPolicy.of(settings, pool, load_keyring(settings))
        await policy.refresh()
        found: list[inbound.Received] = []
        for each in recipients:
            received, reply = policy.recipient(each)
            if received is None:
                return NO_USER, f"{each}: {reply}"
            found.append(received)
        if not recipients:
            found = policy.named(message)
            if not found:
                return NO_USER, "no address of ours in the fields Delivered-To, X-Original-To, To and Cc; name it with --recipient"
        ids = await policy.take("", sender_of(message) if sender is None else sender.strip("<>"), found, message)
    finally:
        pool.terminate()
    return STORED, f"stored as {ids[0]}"


def main() -> int:
    """Read, keep, and say how it went."""
    logs.configure("warning")
    parser = argparse.ArgumentParser(prog="sluice inbound pipe")
    parser.add_argument("--sender")
    parser.add_argument("--recipient", action="append", default=[])
    try:
        options = parser.parse_args()
        config = os.environ.get("SLUICE_CONFIG")
        settings = load.load(Path(config) if config else None)
        message = sys.stdin.buffer.read(settings.inbound.max_message_bytes + 1)

        async def run(found: Settings) -> tuple[int, str]:
            async with asyncio.timeout(TOTAL_TIMEOUT_SECONDS):
                return await keep(found, message, options.sender, options.recipient)

        with embedded.resolve(settings.database.url, settings.redis.url, load.state_directory(settings)) as backends:
            code, words = asyncio.run(run(load.with_stores(settings, backends.database_url, backends.redis_url)))
    except (SluiceError, OSError, TimeoutError) as failure:
        code, words = NOT_NOW, str(failure) or "the store did not answer in time"
    except SystemExit:  # of argparse, whose 2 is no word of sysexits.h
        return NOT_NOW
    except Exception as failure:  # a bug of ours must not cost the message
        code, words = NOT_NOW, f"{type(failure).__name__}: {failure}"
    sys.stderr.write(f"sluice inbound pipe: {words}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

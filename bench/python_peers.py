"""`python -m bench.python_peers NAME`: the mail libraries Python programs use, in a process of its own; prints seconds as JSON.

Each composes what the engine composes as far as its library can: one EmailMessage with text and HTML per recipient, filled by
string.Template, flattened, sent over connections that stay open. `-constant` sends ready octets: the SMTP part alone.
"""

import argparse
import asyncio
import email.message
import email.policy
import json
import re
import smtplib
import string
import sys
import time
from typing import Any

import aiosmtplib
import uvloop

from bench import newsletter

NAMES = ("aiosmtplib", "aiosmtplib-constant", "smtplib", "smtplib-constant")


def _template(source: str) -> string.Template:
    plain = re.sub(r"{%.*?%}", "", source).replace("$", "$$")
    return string.Template(re.sub(r"{{\s*(?:subscriber|links)\.(\w+)\s*}}", r"${\1}", plain))


class Letter:
    """The newsletter as an EmailMessage per recipient."""

    def __init__(self) -> None:
        self._html, self._text, self._subject = (_template(s) for s in (newsletter.HTML, newsletter.TEXT, newsletter.SUBJECT))

    def build(self, address: str, data: dict[str, Any]) -> email.message.EmailMessage:
        """One message."""
        values = data | {"email": address, "unsubscribe": f"http://127.0.0.1:8080/u/{address}"}
        message = email.message.EmailMessage(policy=email.policy.SMTP)
        message["From"] = f"Hafenbrief <{newsletter.FROM_EMAIL}>"
        message["To"] = address
        message["Subject"] = self._subject.substitute(values)
        message["Message-ID"] = f"<{address}>"
        message["List-Unsubscribe"] = f"<{values['unsubscribe']}>"
        message.set_content(self._text.substitute(values), cte="quoted-printable")
        message.add_alternative(self._html.substitute(values), subtype="html", cte="quoted-printable")
        return message


async def _aiosmtplib(port: int, connections: int, messages: int, constant: bytes | None) -> None:
    letter, rows = Letter(), iter(newsletter.rows(messages))

    async def worker() -> None:
        client = aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False)
        await client.connect()
        for address, data in rows:
            if constant is None:
                await client.send_message(letter.build(address, data), sender=newsletter.FROM_EMAIL, recipients=[address])
            else:
                await client.sendmail(newsletter.FROM_EMAIL, [address], constant)
        await client.quit()

    await asyncio.gather(*(worker() for _ in range(connections)))


def _smtplib(port: int, messages: int, constant: bytes | None) -> None:
    letter = Letter()
    with smtplib.SMTP("127.0.0.1", port) as client:
        for address, data in newsletter.rows(messages):
            if constant is None:
                client.send_message(letter.build(address, data), newsletter.FROM_EMAIL, [address])
            else:
                client.sendmail(newsletter.FROM_EMAIL, [address], constant)


def main() -> int:
    """Send, say what it cost. Imports are outside the timed part, connecting is in it."""
    parser = argparse.ArgumentParser(prog="bench.python_peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--messages", type=int, default=1000)
    chosen = parser.parse_args()
    constant = newsletter.wire()[2] if chosen.name.endswith("constant") else None
    cpu, wall = time.process_time(), time.perf_counter()
    if chosen.name.startswith("aiosmtplib"):
        uvloop.run(_aiosmtplib(chosen.port, chosen.connections, chosen.messages, constant))
    else:
        _smtplib(chosen.port, chosen.messages, constant)
    spent = {"messages": chosen.messages, "cpu_seconds": time.process_time() - cpu, "seconds": time.perf_counter() - wall}
    print(json.dumps(spent))
    return 0


if __name__ == "__main__":
    sys.exit(main())

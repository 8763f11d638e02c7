"""Mail that comes back, built to order: reports about the message `world` was sent, true and forged."""

import random
import re
from typing import Any

from domain.bounce import shipped_rules
from tests.inbound.conftest import World


def header(world: World, *, number: int = 1, subject: str = "Hello", token: str | None = None) -> str:
    """The header of the message the report is about, with our token."""
    token = world.return_path(number=number).partition("@")[0].removeprefix("b-") if token is None else token
    lines = [
        f"Return-Path: <b-{token}@bounce.mailer.example>", "From: News <news@mailer.example>", f"To: {world.email}",
        f"Subject: {subject}", f"X-FBLId: {token}",
    ]  # fmt: skip
    return "\r\n".join(line for line in lines if token or not line.startswith(("Return-Path", "X-FBLId"))) + "\r\n"


def dsn(
    world: World, *, recipient: str = "", action: str = "failed", status: str = "5.1.1", text: str = "550 5.1.1 User unknown",
    number: int = 1, original: str | None = None, fields: str = "",
) -> bytes:  # fmt: skip
    """A delivery status notification (RFC 3464) as Postfix writes it."""
    returned = header(world, number=number) if original is None else original
    body = f"Final-Recipient: rfc822; {recipient or world.email}\r\nAction: {action}\r\n"
    body += f"Status: {status}\r\n" if status else ""
    body += f"Remote-MTA: dns; mx.reader.example\r\nDiagnostic-Code: smtp; {text}\r\n{fields}"
    return (
        "From: MAILER-DAEMON@mx.relay.example\r\nTo: <sender>\r\nSubject: Undelivered Mail Returned to Sender\r\n"
        "Auto-Submitted: auto-replied\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/report; report-type=delivery-status; boundary="x"\r\n\r\n'
        "--x\r\nContent-Type: text/plain\r\n\r\nThis is the mail system. Your message could not be delivered.\r\n\r\n"
        f"<{recipient or world.email}>: {text}\r\n"
        "--x\r\nContent-Type: message/delivery-status\r\n\r\nReporting-MTA: dns; mx.relay.example\r\n\r\n"
        f"{body}\r\n--x\r\nContent-Type: text/rfc822-headers\r\n\r\n{returned}\r\n--x--\r\n"
    ).encode("utf-8", "surrogateescape")


def arf(world: World, *, kind: str = "abuse", original: str | None = None, fields: str = "") -> bytes:
    """A complaint (RFC 5965)."""
    return (
        "From: feedback@provider.example\r\nTo: fbl@mailer.example\r\nSubject: FW: Hello\r\nMIME-Version: 1.0\r\n"
        'Content-Type: multipart/report; report-type=feedback-report; boundary="y"\r\n\r\n'
        "--y\r\nContent-Type: text/plain\r\n\r\nThis is an abuse report.\r\n"
        "--y\r\nContent-Type: message/feedback-report\r\n\r\n"
        f"Feedback-Type: {kind}\r\nUser-Agent: Provider/1\r\nVersion: 1\r\nSource-IP: 192.0.2.7\r\n"
        f"Reported-Domain: mailer.example\r\nOriginal-Rcpt-To: {world.email}\r\n{fields}\r\n"
        f"--y\r\nContent-Type: message/rfc822\r\n\r\n{header(world) if original is None else original}\r\nHello\r\n--y--\r\n"
    ).encode()


def plain(subject: str, *, sender: str = "Ada <ada@reader.example>", body: str = "Hello", **fields: Any) -> bytes:
    """An ordinary mail."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"From: {sender}\r\nSubject: {subject}\r\n{more}\r\n{body}\r\n".encode()


def soup(seed: int = 1, recipients: int = 200) -> bytes:
    """The dearest message we know to read: a report of many failures, each with a reason of its own out of words that rules look for."""
    words = sorted({word for rule in shipped_rules().rules for pattern in rule.patterns for word in re.findall(r"[a-z]{3,}", pattern)})
    choose = random.Random(seed).choice
    fields = "\r\n".join(
        f"Final-Recipient: rfc822; a{number}@b.example\r\nAction: failed\r\n"
        f"Diagnostic-Code: smtp; 550 {' '.join(choose(words) for _ in range(60))}\r\n"
        for number in range(recipients)
    )
    return (
        "Subject: Undelivered\r\nContent-Type: multipart/report; boundary=x\r\n\r\n"
        f"--x\r\nContent-Type: message/delivery-status\r\n\r\n{fields}\r\n--x--\r\n"
    ).encode()

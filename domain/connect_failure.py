"""What opening a connection to a delivery server may do, and what its failures are called: one wording for engines and for the test send.

TLS and AUTH (S13): with "starttls" and "tls" nothing falls back to plain text, and the certificate must be valid for the host as
written. Two exceptions, because there is nothing to check a name against and nobody in between to keep out: a host on the
loopback, and a host written as an IP address as long as no user name is configured. AUTH goes only over a checked connection,
over the loopback, or where "none" was chosen by name.
"""

import ipaddress
import ssl
from collections.abc import Collection
from typing import Final

from domain.reply import one_line

AUTH_MECHANISMS: Final = "PLAIN, LOGIN and CRAM-MD5"
_SHOWN_CHARACTERS = 300


def is_loopback(host: str) -> bool:
    """Whether the host is this machine."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def checks_certificate(host: str, username: str) -> bool:
    """Whether a certificate must be valid for the host."""
    if is_loopback(host):
        return False
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return True
    return bool(username)


def choose_auth(offered: Collection[str], *, encrypted: bool) -> str | None:
    """The best mechanism both sides have, in lower case: the password in clear only where TLS hides it, or where nothing else is had."""
    order = ("plain", "login", "cram-md5") if encrypted else ("cram-md5", "plain", "login")
    return next((method for method in order if method in offered), None)


def tls_sentence(where: str, error: BaseException) -> str:
    """Why the TLS handshake with `where` failed; of a chain of exceptions the TLS one counts."""
    while not isinstance(error, ssl.SSLError | TimeoutError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate of {where} is not valid: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (getattr(error, "reason", "") or str(error)).replace("_", " ").lower()
        hint = "; does this port speak TLS from the start?" if "wrong version" in reason or "record layer" in reason else ""
        return f"the TLS handshake with {where} failed: {reason}{hint}"
    if isinstance(error, TimeoutError):
        return f"the TLS handshake with {where} took too long"
    return f"{where} closed the connection during the TLS handshake"


def shown(code: int, message: str) -> str:
    """A server's reply as part of a sentence: one clean line of at most 300 characters."""
    text = one_line(message.encode("utf-8", "surrogateescape"))[:_SHOWN_CHARACTERS]
    return f"{code} {text}".rstrip() if code > 0 else text

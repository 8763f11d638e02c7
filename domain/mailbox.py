"""Mailbox: where to fetch mail from, read from a URL. Pure; the password is elsewhere and is only named here."""

import re
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

import msgspec

from domain.errors import Invalid

_PORTS: Final = {"imaps": 993, "imap": 143, "pop3s": 995, "pop3": 110}
_OPTIONS: Final = ("password_file", "password_env", "tls", "ca_file", "keep")
_FORM: Final = "write imaps://user@host/INBOX?password_file=/path, or imap, pop3 or pop3s"


class Mailbox(msgspec.Struct, frozen=True, kw_only=True):
    """One mailbox. `name` is its URL without options: what is shown and what its messages are remembered under."""

    name: str
    protocol: Literal["imap", "pop3"]
    host: str
    port: int
    user: str
    folder: str
    tls: Literal["tls", "starttls", "none"]
    password_file: str = ""
    password_env: str = ""
    ca_file: str = ""  # of the certificate's issuer; empty: those the system trusts
    keep: bool = False  # leave the mail where it is


def parse(url: str) -> Mailbox:
    """Read one URL. Raises Invalid("mailboxes", reason), which never quotes the URL: somebody may have put a password in it."""
    try:
        parts = urlsplit(url)
        port = parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise _wrong(f"is no URL; {_FORM}") from None
    if parts.scheme not in _PORTS or not parts.hostname or port == 0:
        raise _wrong(f"has no scheme or host that we know; {_FORM}")
    where = f"{parts.scheme}://{parts.hostname}"
    if parts.password is not None:
        raise _wrong(f"{where}: has a password in it; put it in a file and name that with ?password_file=/path")
    user = unquote(parts.username or "")
    if not user or re.search(r"[\x00-\x1f\x7f]", user):
        raise _wrong(f"{where}: names no user before the host ({_FORM}); an @ in it is written %40")
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise _wrong(f"{where}: unknown option {unknown[0]!r:.40}; known are {', '.join(_OPTIONS)}")
    if bool(options.get("password_file")) == bool(options.get("password_env")):
        raise _wrong(f"{where}: name the password's place with one of ?password_file=/path and ?password_env=NAME")
    implicit = parts.scheme.endswith("s")
    tls = options.get("tls", "tls" if implicit else "starttls")
    if tls not in (("tls",) if implicit else ("starttls", "none")):
        raise _wrong(f"{where}: tls must be starttls or none with imap and pop3, and is not given with imaps and pop3s")
    if options.get("keep", "no") not in ("yes", "no"):
        raise _wrong(f"{where}: keep must be yes or no")
    folder = unquote(parts.path.strip("/")) or "INBOX"
    if re.search(r'[\x00-\x1f\x7f"\\]', folder) or not folder.isascii():
        raise _wrong(f"{where}: the folder holds characters that IMAP spells otherwise; give its name in modified UTF-7")
    protocol: Literal["imap", "pop3"] = "imap" if parts.scheme.startswith("imap") else "pop3"
    port = port or _PORTS[parts.scheme]
    return Mailbox(
        name=f"{protocol}://{user}@{parts.hostname}:{port}" + (f"/{folder}" if protocol == "imap" else ""),
        protocol=protocol, host=parts.hostname, port=port, user=user, folder=folder, tls=tls,  # type: ignore[arg-type]
        password_file=options.get("password_file", ""), password_env=options.get("password_env", ""),
        ca_file=options.get("ca_file", ""), keep=options.get("keep") == "yes",
    )  # fmt: skip


def _wrong(reason: str) -> Invalid:
    return Invalid("mailboxes", reason)

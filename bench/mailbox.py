"""The HTTP side of the sink: JSON API under `/api/v1`, the mailbox page at `/`, files of `bench/static`.

A bare ASGI application under uvicorn: it shares the event loop with SMTP, so every request is answered from memory in one
step, and headers are parsed only for messages somebody looks at. Everything a mail holds is hostile: the page inserts text
only, and HTML parts are served into a sandboxed frame under a policy that allows no script and, unless asked, no image.
"""

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from datetime import UTC, datetime
from email import policy
from email.message import EmailMessage
from email.parser import BytesHeaderParser, BytesParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit

import uvicorn

from bench.sink_protocol import Kept
from bench.sink_script import check_rules
from config.serving import Server
from domain.errors import ConfigurationError, Invalid, NotFound

if TYPE_CHECKING:
    from bench.sink import RunningSink

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

STATIC: Final = Path(__file__).parent / "static"
_FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/mailbox.css": ("mailbox.css", "text/css; charset=utf-8"),
    "/static/mailbox.js": ("mailbox.js", "text/javascript; charset=utf-8"),
    "/static/icon.svg": ("icon.svg", "image/svg+xml"),
}
_PAGE_POLICY: Final = "default-src 'self'; frame-src 'self'; frame-ancestors 'self'; base-uri 'none'; form-action 'self'; object-src 'none'"
# The mail itself: inline styles only; `sandbox` holds even when the address is opened outside the page.
_MAIL_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src {images}; font-src 'none'; frame-ancestors 'self'; "
    "form-action 'none'; sandbox allow-popups allow-popups-to-escape-sandbox"
)
_MAX_BODY_BYTES: Final = 1 << 20
_MAX_LIMIT: Final = 500
_HEAD: Final = re.compile(r"<head(\s[^>]*)?>", re.IGNORECASE)


class MailboxServer:
    """uvicorn on a listening socket, inside the sink's own event loop, without its signal handling."""

    def __init__(self, running: "RunningSink", listener: socket.socket) -> None:
        config = uvicorn.Config(
            Mailbox(running), lifespan="off", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=1, ws="none"
        )
        self._server = Server(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Answer requests from now on."""
        # The socket listens already: a request that comes before uvicorn accepts waits in its queue.
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._listener]))

    async def stop(self) -> None:
        """Close within a second, whoever is still connected."""
        self._server.should_exit = True
        self._server.force_exit = True
        if self._task is not None:
            await self._task


class Mailbox:
    """The ASGI application."""

    def __init__(self, running: "RunningSink") -> None:
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; an unknown path, method or value gives problem+json (RFC 9457)."""
        if scope["type"] != "http":
            return
        try:
            body = b""
            if scope["method"] in ("POST", "PUT", "DELETE"):
                _same_origin(scope)
                body = await _read_body(receive)
            status, kind, content, headers = self._answer(scope, body)
        except NotFound as error:
            status, kind, content, headers = _problem(404, str(error))
        except Invalid as error:
            status, kind, content, headers = _problem(400, str(error), field=error.field)
        except ConfigurationError as error:
            status, kind, content, headers = _problem(400, "; ".join(error.problems))
        except PermissionError as error:
            status, kind, content, headers = _problem(403, str(error))
        fields = [
            (b"content-type", kind.encode()),
            (b"content-length", b"%d" % len(content)),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
        ]
        headers.setdefault("content-security-policy", _PAGE_POLICY)
        fields += [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": fields})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else content})

    def _answer(self, scope: Scope, body: bytes) -> tuple[int, str, bytes, dict[str, str]]:
        method, path = scope["method"], scope["path"]
        reading = method in ("GET", "HEAD")
        if reading and path in _FILES:
            name, kind = _FILES[path]
            return 200, kind, (STATIC / name).read_bytes(), {}
        query = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True, errors="replace")
        sink = self._running.sink
        if path == "/api/v1/messages" and reading:
            return _json(200, self._list(query))
        if path == "/api/v1/messages" and method == "DELETE":
            sink.clear()
            return 204, "application/json", b"", {}
        if path == "/api/v1/counters" and reading:
            return _json(200, self._running.counters())
        if path == "/api/v1/reset" and method == "POST":
            sink.reset()
            return _json(200, self._running.counters())
        if path == "/api/v1/script" and reading:
            return _json(200, {"rule": [_rule_table(rule) for rule in sink.script.rules]})
        if path == "/api/v1/script" and method == "PUT":
            self._running.set_rules(_rules(body))
            return _json(200, {"rule": [_rule_table(rule) for rule in sink.script.rules]})
        match = re.fullmatch(r"/api/v1/messages/(\d{1,18})(/source|/html)?", path)
        if match and reading:
            kept = sink.find(int(match[1]))
            if kept is None:
                raise NotFound("message", int(match[1]))
            if match[2] == "/source":
                return 200, "text/plain; charset=utf-8", kept.source, {"content-security-policy": "default-src 'none'; sandbox"}
            if match[2] == "/html":
                return _html(kept, images=query.get("images", ["0"])[-1] == "1")
            return _json(200, _whole(kept))
        if path in (*_FILES, "/api/v1/messages", "/api/v1/counters", "/api/v1/reset", "/api/v1/script") or match:
            return _problem(405, f"{method} is not possible here")
        raise NotFound("page", path)

    def _list(self, query: dict[str, list[str]]) -> dict[str, Any]:
        limit = _whole_number(query, "limit", 50, _MAX_LIMIT)
        words = query.get("query", [""])[-1].lower().split()
        kept = self._running.sink.kept()
        found: list[dict[str, Any]] = []
        for one in kept:
            if len(found) >= limit:
                break
            summary = summarise(one)
            if not words or all(word in _haystack(summary) for word in words):
                found.append(summary)
        return {"messages": found, "kept": len(kept), "accepted": self._running.sink.messages}


def summarise(kept: Kept) -> dict[str, Any]:
    """What the list shows of one message; made once per message."""
    if kept.summary is None:
        source = kept.source
        end = source.find(b"\r\n\r\n")
        headers = BytesHeaderParser(policy=policy.default).parsebytes(source if end < 0 else source[: end + 4])
        kept.summary = {
            "id": kept.number,
            "at": datetime.fromtimestamp(kept.at, UTC).isoformat(),
            "mail_from": _text(kept.mail_from),
            "recipients": [_text(one) for one in kept.recipients],
            "from": _header(headers, "From"),
            "to": _header(headers, "To"),
            "subject": _header(headers, "Subject"),
            "message_id": _header(headers, "Message-ID"),
            "size": kept.size,
            "tls": bool(kept.session.tls),
        }
    summary: dict[str, Any] = kept.summary
    return summary


def _whole(kept: Kept) -> dict[str, Any]:
    message = _parse(kept)
    session = kept.session
    text, html = _part(message, "plain"), _part(message, "html")
    attachments = []
    for part in message.walk():
        if not part.is_multipart() and (part.get_content_disposition() == "attachment" or part.get_content_maintype() != "text"):
            payload = part.get_payload(decode=True)
            size = len(payload) if isinstance(payload, bytes) else 0
            attachments.append({"name": _scrub(part.get_filename() or ""), "type": part.get_content_type(), "size": size})
    headers = []
    for name, value in message.raw_items():
        headers.append([_scrub(name), _scrub(str(value))])
    return {
        **summarise(kept),
        "headers": headers,
        "text": text,
        "html": html,
        "attachments": attachments,
        "envelope": {"mail_from": _text(kept.mail_from), "recipients": [_text(one) for one in kept.recipients]},
        "session": {"client": session.client, "helo": session.helo, "extended": session.extended, "user": session.user, "tls": session.tls},
        "sizes": {"source": len(kept.source), "wire": kept.size, "text": len(text or ""), "html": len(html or "")},
    }


def _html(kept: Kept, *, images: bool) -> tuple[int, str, bytes, dict[str, str]]:
    html = _part(_parse(kept), "html")
    if html is None:
        raise NotFound("HTML part of message", kept.number)
    # Links must leave the frame: nothing but the sink itself may be framed here.
    base = '<base target="_blank">'
    match = _HEAD.search(html)
    html = html[: match.end()] + base + html[match.end() :] if match else base + html
    headers = {"content-security-policy": _MAIL_POLICY.format(images="http: https: data:" if images else "data:")}
    return 200, "text/html; charset=utf-8", html.encode("utf-8", "replace"), headers


def _parse(kept: Kept) -> EmailMessage:
    return BytesParser(policy=policy.default).parsebytes(kept.source)


def _part(message: EmailMessage, subtype: str) -> str | None:
    for part in message.walk():
        if part.get_content_type() == f"text/{subtype}" and part.get_content_disposition() != "attachment":
            try:
                content = part.get_content()
            except (LookupError, ValueError, KeyError):
                # An unknown charset or broken encoding: show what can be shown.
                payload = part.get_payload(decode=True)
                content = payload.decode("utf-8", "replace") if isinstance(payload, bytes) else str(payload)
            return _scrub(str(content))
    return None


def _header(headers: Any, name: str) -> str:
    try:
        value = headers.get(name)
    except (ValueError, IndexError, AttributeError, TypeError):
        # The standard parser gives up on some malformed fields; the raw text is still worth showing.
        value = {key.lower(): text for key, text in headers.raw_items()}.get(name.lower())
    return _scrub(str(value)) if value is not None else ""


def _haystack(summary: dict[str, Any]) -> str:
    return " ".join(
        (summary["mail_from"], *summary["recipients"], summary["from"], summary["to"], summary["subject"], summary["message_id"])
    ).lower()


def _scrub(text: str) -> str:
    """Surrogates (octets the parser could not read) cannot be written as JSON."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(octets: bytes) -> str:
    return octets.decode("utf-8", "replace")


def _whole_number(query: dict[str, list[str]], name: str, default: int, most: int) -> int:
    text = query.get(name, [str(default)])[-1]
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:9]) <= most:
        raise Invalid(name, f"must be a number from 1 to {most}", text)
    return int(text)


def _rules(body: bytes) -> Any:
    try:
        table = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Invalid("body", 'must be JSON such as {"rule": []}') from error
    if not isinstance(table, dict) or set(table) != {"rule"}:
        raise Invalid("body", 'must be an object with the one key "rule"')
    return check_rules(table["rule"], "body")


def _rule_table(rule: Any) -> dict[str, Any]:
    return {name: getattr(rule, name) for name in rule.__struct_fields__}


def _same_origin(scope: Scope) -> None:
    """A page of another site must not empty the mailbox of whoever looks at it."""
    headers = dict(scope["headers"])
    origin = headers.get(b"origin")
    if origin is not None and urlsplit(origin.decode("latin-1")).netloc != headers.get(b"host", b"").decode("latin-1"):
        raise PermissionError("Origin: requests from other sites are refused")


async def _read_body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        event = await receive()
        parts.append(event.get("body", b""))
        size += len(parts[-1])
        if size > _MAX_BODY_BYTES:
            raise Invalid("body", f"must not be over {_MAX_BODY_BYTES} octets")
        if not event.get("more_body"):
            return b"".join(parts)


def _json(status: int, value: Any) -> tuple[int, str, bytes, dict[str, str]]:
    return status, "application/json", json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), {}


def _problem(status: int, detail: str, **more: str) -> tuple[int, str, bytes, dict[str, str]]:
    titles = {400: "Bad request", 403: "Forbidden", 404: "Not found", 405: "Method not allowed"}
    body = {"type": "about:blank", "title": titles[status], "status": status, "detail": detail, **more}
    return status, "application/problem+json", json.dumps(body).encode(), {}

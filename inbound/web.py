"""The public HTTP side: one-click unsubscribe (RFC 8058), clicks, opens and web views, as a small ASGI application under uvicorn.

GET and HEAD show a page and never act, so link scanners unsubscribe nobody (S5). A POST with a token of ours acts, whatever its body
says: the token is the proof, the body of RFC 8058 (`List-Unsubscribe=One-Click`) only tells programs apart from people.
A click id that comes back in a postback is a conversion; a reader may report abuse with the token of his unsubscribe link.
A click is redirected to an address that the campaign itself names, or is not there (S4). No cookies, nothing cached, no query of the
database before the signature holds. What the token alone decides is taken whether PostgreSQL is there or not (`inbound.requests`).
"""

import asyncio
import base64
import hashlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal

import structlog
import uvicorn

from config import tasks
from config.serving import BoundedHttp, Server
from domain import links
from domain.errors import Unavailable
from inbound import abuse
from inbound.postback import Postbacks
from inbound.requests import Requests
from inbound.tracking import GIF, Tracker
from inbound.web_view import POLICY, WebView

log = structlog.get_logger(__name__)

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Answer = tuple[int, bytes, tuple[tuple[bytes, bytes], ...]]  # status, body, header fields beside the usual ones

MAX_BODY_BYTES: Final = 64 * 1024
BODY_TIMEOUT_SECONDS: Final = 10.0
STORE_TIMEOUT_SECONDS: Final = 5.0
RETRY_AFTER_SECONDS: Final = 60
MAX_CONNECTIONS: Final = 1000

_STYLE: Final = (
    "body{font:16px/1.5 system-ui,sans-serif;margin:0;min-height:100vh;display:grid;place-items:center;background:#f4f5f7;color:#1c2430}"
    "main{max-width:26rem;margin:1rem;padding:2rem;background:#fff;border-radius:12px;box-shadow:0 1px 4px #0002}"
    "h1{font-size:1.25rem;margin:0 0 .75rem}p{margin:.5rem 0}"
    "button{font:inherit;margin-top:1rem;padding:.6rem 1.2rem;border:0;border-radius:8px;background:#1f5eff;color:#fff;cursor:pointer}"
    "@media(prefers-color-scheme:dark){body{background:#12161c;color:#e6e9ee}main{background:#1b2129}}"
)
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"content-type", b"text/html; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (
        b"content-security-policy",
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'".encode(),
    ),
    (b"referrer-policy", b"no-referrer"),  # the address of the page is the token
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"x-robots-tag", b"noindex, nofollow"),
)


VIEW_POLICY: Final = (b"content-security-policy", POLICY.encode())
PLAIN: Final = (b"content-type", b"text/plain; charset=utf-8")
PIXEL_HEADERS: Final[tuple[tuple[bytes, bytes], ...]] = (
    (b"content-type", b"image/gif"),
    (b"cache-control", b"no-store, private, max-age=0"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-robots-tag", b"noindex, nofollow"),
    (b"cross-origin-resource-policy", b"cross-origin"),  # web mail shows it inside its own pages
)


def _page(title: str, *paragraphs: str, button: str = "", fields: str = "") -> bytes:
    acts = "" if fields else ' name="List-Unsubscribe" value="One-Click"'
    form = f'<form method="post">{fields}<button{acts}>{button}</button></form>' if button else ""
    text = "".join(f"<p>{paragraph}</p>" for paragraph in paragraphs)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style><main><h1>{title}</h1>{text}{form}</main></html>"
    ).encode()


def _ask(token: str) -> bytes:
    abuse_form = f'You never asked for it? <a href="{links.PATHS["abuse"]}{token}">Report abuse</a>'
    return _page("Unsubscribe", "You will get no more mail from this list.", abuse_form, button="Unsubscribe")


DONE: Final = _page(
    "You are unsubscribed", "This address gets no more mail from this list. It may take a minute for mail already on its way."
)
KEPT: Final = _page(
    "Your wish is recorded", "This address will get no more mail from this list. It takes effect in a moment; there is nothing more to do."
)
REPORT: Final = _page(
    "Report abuse",
    "Tell us what is wrong with this mail. You will get no more mail from its sender.",
    fields="".join(f'<p><label><input type="radio" name="reason" value="{key}"> {text}</label></p>' for key, text in abuse.REASONS.items())
    + f'<p><textarea name="comment" rows="4" maxlength="{abuse.MAX_COMMENT}" aria-label="Comment"></textarea></p>',
    button="Report",
)
REPORTED: Final = _page("Thank you", "Your report was recorded. This address gets no more mail from this sender.")
UNKNOWN: Final = _page("Page not found", "This link is incomplete or not one of ours. Use the link in the message as it is.")
LATER: Final = _page("Please try again", "We could not record this just now. Nothing is lost: open the link again in a minute.")
AWAY: Final = _page("Please try again", "We cannot look this link up just now. Open it again in a minute.")
TOO_LARGE: Final = _page("Request too large", "This page takes a click, nothing more.")
TOO_SLOW: Final = _page("Request timed out", "The request did not arrive in time. Open the link again.")
READ_ONLY: Final = _page("Method not allowed", "This address knows GET and HEAD.")
NOT_ALLOWED: Final = _page("Method not allowed", "This page knows GET, HEAD and POST.")
MOVED: Final = _page("This way", "The page you asked for is elsewhere; your browser should have gone there by itself.")
ABOUT: Final = _page(
    "Sluice", "This address serves the links of mail sent with Sluice, a bulk mail system. There is nothing else to see here."
)


class Web:
    """The application. Tells `changed` after an unsubscribe, so that engines hear of it at once."""

    def __init__(
        self, unsubscribe_key: bytes, changed: Callable[[], Awaitable[None]], tracker: Tracker, web_view: WebView,
        postbacks: Postbacks, requests: Requests,
    ) -> None:  # fmt: skip
        self._key = unsubscribe_key
        self._changed = changed
        self._tracker = tracker
        self._web_view = web_view
        self._postbacks = postbacks
        self._requests = requests

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI 3, `http` only."""
        if scope["type"] != "http":
            raise RuntimeError(f"this application speaks http, not {scope['type']!r}")
        status, body, more = await self._answer(scope, receive)
        usual = PIXEL_HEADERS if body is GIF else HEADERS
        if more and more[0] in (VIEW_POLICY, PLAIN):
            usual = tuple(each for each in HEADERS if each[0] != more[0][0])
        headers = [*usual, (b"content-length", str(len(body)).encode()), *more]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    async def _answer(self, scope: Message, receive: Receive) -> Answer:
        method = scope["method"]
        # As sent, not decoded: a token has one spelling, and every other one is not ours
        path = bytes(scope["raw_path"]).partition(b"?")[0].decode("latin-1")
        if method not in ("GET", "HEAD", "POST"):
            return 405, NOT_ALLOWED, ((b"allow", b"GET, HEAD, POST"),)
        if path == "/" and method != "POST":
            return 200, ABOUT, ()
        for purpose in ("click", "open", "web-view"):
            if path.startswith(links.PATHS[purpose]):
                if method == "POST":
                    return 405, READ_ONLY, ((b"allow", b"GET, HEAD"),)
                text = path.removeprefix(links.PATHS[purpose])
                if purpose == "open":
                    return self._open(scope, text)
                return await (self._click(scope, text) if purpose == "click" else self._view(text))
        if path.startswith(links.PATHS["postback"]):
            return await self._postback(scope, receive, path.removeprefix(links.PATHS["postback"]))
        prefix = next((links.PATHS[purpose] for purpose in ("unsubscribe", "abuse") if path.startswith(links.PATHS[purpose])), "")
        parts = links.read(self._key, path.removeprefix(prefix)) if prefix else None
        if parts is None:
            return 404, UNKNOWN, ()
        complains = prefix == links.PATHS["abuse"]
        if method != "POST":
            return 200, REPORT if complains else _ask(path.removeprefix(prefix)), ()
        body, refused = await _body(receive)
        if refused:
            return refused
        if not complains:
            return await self._act("unsubscribe", parts, b"")
        try:
            abuse.said_in(body)
        except ValueError:
            return 400, UNKNOWN, ()
        return await self._act("abuse", parts, body)

    async def _postback(self, scope: Message, receive: Receive, text: str) -> Answer:
        if scope["method"] == "HEAD":
            return 405, READ_ONLY, ((b"allow", b"GET, POST"),)
        body, refused = await _body(receive) if scope["method"] == "POST" else (b"", None)
        if refused:
            return refused
        try:
            async with asyncio.timeout(2 * STORE_TIMEOUT_SECONDS):
                answer = await self._postbacks.answer(text, scope["query_string"], body)
        except (Unavailable, TimeoutError) as failure:
            held = self._postbacks.held(text, scope["query_string"], body)
            if held is None:
                return 404, UNKNOWN, ()
            if await self._requests.keep(held):
                return 200, b"kept\n", (PLAIN,)
            log.warning("a postback could not be recorded; the tracker was asked to repeat it", reason=str(failure))
            return 503, AWAY, ((b"retry-after", str(RETRY_AFTER_SECONDS).encode()),)
        return (404, UNKNOWN, ()) if answer is None else (*answer, (PLAIN,))

    async def _click(self, scope: Message, text: str) -> Answer:
        try:
            async with asyncio.timeout(2 * STORE_TIMEOUT_SECONDS):
                url = await self._tracker.click(scope["method"], text, dict(scope["headers"]))
        except (Unavailable, TimeoutError) as failure:
            log.warning("the address of a link could not be looked up", reason=str(failure))
            return 503, AWAY, ((b"retry-after", str(RETRY_AFTER_SECONDS).encode()),)
        if url is None:
            return 404, UNKNOWN, ()
        return 302, MOVED, ((b"location", url.encode("ascii")),)

    async def _view(self, text: str) -> Answer:
        try:
            async with asyncio.timeout(2 * STORE_TIMEOUT_SECONDS):
                page = await self._web_view.page(text)
        except (Unavailable, TimeoutError) as failure:
            log.warning("a message could not be shown again", reason=str(failure))
            return 503, AWAY, ((b"retry-after", str(RETRY_AFTER_SECONDS).encode()),)
        return (404, UNKNOWN, ()) if page is None else (200, page, (VIEW_POLICY,))

    def _open(self, scope: Message, text: str) -> Answer:
        if not self._tracker.open(scope["method"], text, dict(scope["headers"])):
            return 404, UNKNOWN, ()
        return 200, GIF, ()

    async def _act(self, kind: Literal["unsubscribe", "abuse"], parts: links.LinkParts, body: bytes) -> Answer:
        outcome = await self._requests.take(kind, parts, body)
        if outcome == "refused":
            return 503, LATER, ((b"retry-after", str(RETRY_AFTER_SECONDS).encode()),)
        if outcome == "unknown":
            return 404, UNKNOWN, ()
        if outcome == "fresh":
            await self._changed()
        return 200, REPORTED if kind == "abuse" else KEPT if outcome == "kept" else DONE, ()


async def _body(receive: Receive) -> tuple[bytes, Answer | None]:
    """The body, and an answer where it is too long or too slow."""
    pieces: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return b"", (400, TOO_SLOW, ())
                pieces.append(message.get("body", b""))
                size += len(pieces[-1])
                if size > MAX_BODY_BYTES:
                    return b"", (413, TOO_LARGE, ((b"connection", b"close"),))
                if not message.get("more_body"):
                    return b"".join(pieces), None
    except TimeoutError:
        return b"", (408, TOO_SLOW, ((b"connection", b"close"),))


class WebServer:
    """The listening socket and the server on it."""

    def __init__(self, web: Web, host: str, port: int) -> None:
        """Bind at once, so a taken port is an error here. Raises OSError."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024, reuse_port=False)
        self._server = Server(
            uvicorn.Config(
                web,
                http=BoundedHttp,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_keep_alive=5,
                timeout_graceful_shutdown=1,
            )
        )
        self._task: asyncio.Task[None] | None = None

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        host, port = self._socket.getsockname()[:2]
        return str(host), int(port)

    async def start(self) -> None:
        """Serve from now on."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise RuntimeError("the HTTP server ended while it started")
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Finish what is being answered, at most a second."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=2.0)
            await tasks.end([self._task], 1.0)
        self._socket.close()

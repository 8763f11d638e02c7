"""Request bodies, before the framework sees them: bounded, of a type we take, JSON that means one thing only.

JSON parsers disagree about duplicate keys, NaN and nesting, and PostgreSQL stores no NUL: all of that is refused here, once
for every endpoint. The body of an import is passed on as it streams in and is not limited.
"""

import asyncio
import json
import re
from typing import Any, Final

import msgspec
from litestar import Request

from control.asgi import App, Message, Receive, Scope, Send
from control.errors import FieldError, field_error, problem, send_problem
from domain.errors import Invalid

BODY_TIMEOUT_SECONDS: Final = 30.0
STREAMED: Final = re.compile(
    r"/api/v1/(?:lists/\d+/imports|campaigns/\d+/attachments|messages/stream|(?:bounces|suppressions)/imports)/?"
).fullmatch
_SURROGATE = re.compile(r"\\[uU][dD][89a-fA-F]").search


class Refused(Exception):
    """A body that is not taken; becomes a problem."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        super().__init__(detail)


class Bodies:
    """ASGI: reads and checks the body of every writing request under `/api/`; leaves it in the connection's state as `body`."""

    def __init__(self, app: App, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http" or not scope["path"].startswith("/api/") or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            if headers.get(b"content-encoding", b"identity").strip().lower() != b"identity":
                raise Refused(415, "Content-Encoding is not supported; send the body uncompressed")
            if scope["method"] == "POST" and STREAMED(scope["path"]):
                await self.app(scope, receive, send)
                return
            try:
                async with asyncio.timeout(BODY_TIMEOUT_SECONDS):
                    body = await self._read(headers, receive)
            except TimeoutError:
                raise Refused(400, f"the body did not arrive within {BODY_TIMEOUT_SECONDS:.0f} s") from None
            if body:
                kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
                if kind != b"application/json":
                    raise Refused(415, "send JSON, with Content-Type: application/json")
                check_json(body)
        except Refused as error:
            await send_problem(send, problem(error.status, str(error)))
            return
        except Invalid as error:
            await send_problem(send, problem(422, str(error), [FieldError(error.field, error.reason)]))
            return
        scope.setdefault("state", {})["body"] = body
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        too_large = Refused(
            413, f"the body may have {self.max_bytes} bytes; recipients go through POST /lists/{{id}}/imports, which takes any size"
        )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            raise too_large
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise Refused(400, "the body ended early")
            pieces.append(message["body"])
            size += len(message["body"])
            if size > self.max_bytes:
                raise too_large
            if not message["more_body"]:
                return b"".join(pieces)


def strict_types(request: Request[Any, Any, Any]) -> None:
    """Before every handler, after its guards: a body must have the very types of its Struct. The framework itself would read "7" as 7.

    Raises Invalid naming the field.
    """
    field = request.route_handler.parsed_data_field
    body = request.scope["state"].get("body")
    if field is None or body is None:
        return
    try:
        msgspec.json.decode(body, type=field.annotation)
    except msgspec.ValidationError as error:
        message, _, place = str(error).partition(" - at `$")
        found = field_error(place.rstrip("`").lstrip("."), message, field.annotation)
        raise Invalid(found.field, found.reason) from None
    except msgspec.MsgspecError as error:
        if not body:
            raise Invalid("body", "is empty; send a JSON object") from None
        raise Invalid("body", f"is not valid JSON: {error}"[:300]) from None


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def check_json(body: bytes) -> None:
    """Raises Refused (400) for what is no JSON or ambiguous JSON, Invalid for text nobody can store."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(400, f"the body is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise Refused(400, "the JSON is nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not valid JSON: {error}"[:300]) from None
    if "\\u0000" in text or _SURROGATE(text):
        _check_text(value, "")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _check_text(value: Any, path: str) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise Invalid(path or "body", "contains a NUL character")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise Invalid(path or "body", "contains half of a surrogate pair") from None
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name, path or "body")
            _check_text(item, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            _check_text(item, f"{path}[{i}]")

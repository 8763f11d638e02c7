"""Errors as RFC 9457 problems that name the field: one table from exceptions to HTTP statuses.

{"type", "title", "status", "detail", "errors": [{"field", "reason"}]}; `errors` is there when something in the request is to
blame. What is not in the table is a bug of ours: it is logged, and answered 500 without details.
"""

import difflib
import logging
import re
from typing import Any

import asyncpg
import msgspec
import redis.exceptions
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import ExceptionHandlersMap

from control.asgi import Send
from domain import errors
from store import postgres

MEDIA_TYPE = "application/problem+json"

_log = logging.getLogger(__name__)

TITLES = {
    400: ("bad-request", "The request cannot be read"),
    401: ("unauthorized", "No valid API key"),
    403: ("forbidden", "The API key may not do this"),
    404: ("not-found", "There is no such thing"),
    405: ("method-not-allowed", "The method is not allowed here"),
    409: ("conflict", "The present state does not allow it"),
    413: ("too-large", "The request body is too large"),
    415: ("unsupported-media-type", "The content type is not supported"),
    422: ("invalid", "The request is refused"),
    429: ("too-many-requests", "Too many requests"),
    500: ("internal-error", "Internal error"),
    503: ("unavailable", "Temporarily unavailable"),
}

# exception -> status; the first that fits counts
STATUS: tuple[tuple[type[BaseException], int], ...] = (
    (errors.Invalid, 422),
    (errors.NotFound, 404),
    (errors.Conflict, 409),
    (errors.Unavailable, 503),
    *((kind, 503) for kind in postgres.UNAVAILABLE),
    (asyncpg.QueryCanceledError, 503),
    (asyncpg.DeadlockDetectedError, 503),
    (asyncpg.SerializationError, 503),
    (asyncpg.OutOfMemoryError, 503),
    (asyncpg.DiskFullError, 503),
    (asyncpg.DataError, 422),
    (redis.exceptions.RedisError, 503),
)
RETRY_AFTER_SECONDS = 2


class FieldError(msgspec.Struct, frozen=True):
    """One thing wrong with the request; `field` is written the way the caller wrote it."""

    field: str
    reason: str


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The body of every answer that is not a success (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[FieldError] = []


class SeveralInvalid(errors.Invalid):
    """Several things wrong with one request, each named by its place."""

    def __init__(self, found: list[FieldError]) -> None:
        super().__init__(found[0].field, found[0].reason)
        self.found = found


def problem(status: int, detail: str = "", fields: list[FieldError] | None = None) -> Problem:
    """A problem with the type and title of its status."""
    slug, title = TITLES.get(status, ("error", "The request failed"))
    return Problem(type=f"urn:sluice:problem:{slug}", title=title, status=status, detail=detail or title, errors=fields or [])


def of_exception(error: BaseException) -> Problem | None:
    """The problem an exception becomes; None when it is a bug."""
    status = next((status for kind, status in STATUS if isinstance(error, kind)), None)
    if status is None:
        return None
    if isinstance(error, SeveralInvalid):
        others = f" (and {len(error.found) - 1} more)" if len(error.found) > 1 else ""
        return problem(status, f"{error.field}: {error.reason}{others}", error.found)
    if isinstance(error, errors.Invalid):
        return problem(status, f"{error.field}: {error.reason}", [FieldError(error.field, error.reason)])
    if isinstance(error, errors.SluiceError):
        return problem(status, str(error))
    if isinstance(error, asyncpg.DataError):
        return problem(status, "a value does not fit where it is stored")
    return problem(status, "a store did not answer in time; nothing is known to have changed, try again")


async def send_problem(send: Send, answer: Problem, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Answer below the framework."""
    body = msgspec.json.encode(answer)
    await send(
        {
            "type": "http.response.start",
            "status": answer.status,
            "headers": [
                (b"content-type", MEDIA_TYPE.encode()),
                (b"content-length", str(len(body)).encode()),
                *_headers(answer.status),
                *(headers or []),
            ],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _headers(status: int) -> list[tuple[bytes, bytes]]:
    return [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())] if status in (429, 503) else []


def _respond(answer: Problem) -> Response[Problem]:
    headers = {name.decode(): value.decode() for name, value in _headers(answer.status)}
    return Response(answer, status_code=answer.status, media_type=MEDIA_TYPE, headers=headers)


_UNKNOWN_FIELD = re.compile(r"unknown field `(.*)`$")
_MISSING_FIELD = re.compile(r"missing required field `(.*)`$")
_EXPECTED = re.compile(r"^Expected ")
_NOT_ALLOWED = re.compile(r"Invalid enum value (.*)$", re.DOTALL)
_STEP = re.compile(r"[^.\[\]]+|\[[^\]]*\]")
_NAMES = {
    "`str`": "text",
    "`int`": "a whole number",
    "`float`": "a number",
    "`bool`": "true or false",
    "`array`": "an array",
    "`object`": "an object",
    "`null`": "null",
}


def _on_validation(request: Request[Any, Any, Any], error: ValidationException) -> Response[Problem]:
    """What the framework found wrong with body, query or path; a path that cannot name anything names nothing."""
    found: list[FieldError] = []
    extra = error.extra if isinstance(error.extra, list) else []
    for item in extra:
        if not isinstance(item, dict):
            continue
        if item.get("source") == "path":
            return _respond(problem(404))
        key, message = str(item.get("key", "")), str(item.get("message", ""))
        parameter = request.route_handler.parsed_fn_signature.parameters.get(key)
        if parameter is None:
            found.append(field_error(key, message))
            continue
        wrong = field_error("", message, parameter.annotation)
        found.append(FieldError(getattr(parameter.kwarg_definition, "name", None) or key, wrong.reason))
    return _respond(problem(422, "; ".join(f"{e.field}: {e.reason}" for e in found) or str(error.detail), found))


def field_error(key: str, message: str, kind: Any = None) -> FieldError:
    """msgspec's words in ours. `kind` is the type the whole was read as: what is allowed at `key` can then be named."""
    key = "" if key == "data" else key
    if unknown := _UNKNOWN_FIELD.search(message):
        structs = [each for each in _types_at(kind, key) if isinstance(each, msgspec.inspect.StructType)]
        known = [field.encode_name for each in structs for field in each.fields]
        meant = difflib.get_close_matches(unknown[1], known, 1)
        advice = f"; did you mean {meant[0]}?" if meant else ""
        return FieldError(".".join(filter(None, (key, unknown[1]))), f"there is no such field{advice}")
    if missing := _MISSING_FIELD.search(message):
        return FieldError(".".join(filter(None, (key, missing[1]))), "is required")
    if message == "'data'":
        return FieldError("body", "is empty; send a JSON object")
    if refused := _NOT_ALLOWED.match(message):
        literals = [each for each in _types_at(kind, key) if isinstance(each, msgspec.inspect.LiteralType)]
        allowed = ", ".join(str(value) for each in literals for value in each.values)
        return FieldError(key or "body", f"must be one of {allowed}, not {refused[1]:.80}" if allowed else f"may not be {refused[1]:.80}")
    reason = _EXPECTED.sub("must be ", message)
    for name, words in _NAMES.items():
        reason = reason.replace(name, words)
    return FieldError(key or "body", reason)


def _types_at(kind: Any, place: str) -> list[msgspec.inspect.Type]:
    """What may stand at `place` (`items[0].kind`) of a value of the type `kind`, each alternative; nothing where that is not known."""
    if kind is None:
        return []
    try:
        at = [msgspec.inspect.type_info(kind)]
    except TypeError:
        return []
    for step in [*_STEP.findall(place), ""]:
        at = [inner for each in at for inner in _alternatives(each)]
        if step.startswith("["):
            at = [inner for each in at for name in ("item_type", "value_type") if (inner := getattr(each, name, None)) is not None]
        elif step:
            at = [field.type for each in at if isinstance(each, msgspec.inspect.StructType) for field in each.fields
                  if field.encode_name == step]  # fmt: skip
    return at


def _alternatives(info: msgspec.inspect.Type) -> list[msgspec.inspect.Type]:
    if isinstance(info, msgspec.inspect.Metadata):
        return _alternatives(info.type)
    if isinstance(info, msgspec.inspect.UnionType):
        return [inner for each in info.types for inner in _alternatives(each)]
    return [info]


def on_http(_: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    """What the framework says of a request; where it has only the name of the status, more."""
    detail = str(error.detail)
    if error.status_code == 404 and detail == "Not Found":
        detail = "there is no such path; /docs shows them all"
    if error.status_code == 405 and error.headers:
        detail = f"this path takes {error.headers.get('allow', 'other methods')}"
    answer = problem(error.status_code, detail)
    response = _respond(answer)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


def _on_any(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    answer = of_exception(error)
    if answer is None:
        _log.error("%s %s failed", request.method, request.scope.get("path", "")[:200].encode("unicode_escape").decode(), exc_info=error)
        answer = problem(500, "the failure was logged; nothing is known to have changed")
    return _respond(answer)


HANDLERS: ExceptionHandlersMap = {ValidationException: _on_validation, HTTPException: on_http, Exception: _on_any}

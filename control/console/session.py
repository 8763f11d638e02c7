"""Who sits at the browser: sign-in with an API key, a cookie with a random session id, and proof that a form is ours.

The cookie is HttpOnly and SameSite=Strict, and every POST must come from our own pages by its Origin, so no other site can act
for somebody who is signed in.
"""

import hmac
from typing import Any
from urllib.parse import urlsplit

from litestar import Request
from litestar.datastructures import Cookie
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException

from control.guards import Caller
from control.services import Services
from store import console_sessions, users
from store.postgres import connection

COOKIE = "sluice_session"

AnyRequest = Request[Any, Any, Any]


async def sign_in(services: Services, key: str) -> str | None:
    """The token of a new session, None when the key is nobody's. Raises Unavailable, RedisError."""
    prefix = users.prefix_of(key)
    if not prefix:
        return None
    async with connection(services.pool) as conn:
        owner = await users.find_key(conn, prefix)
    hashed = users.hash_key(key)
    if owner is None or not hmac.compare_digest(hashed, owner.hash):
        return None
    return await console_sessions.begin(services.redis, console_sessions.Session(prefix, hashed))


async def caller_of(request: AnyRequest, services: Services) -> Caller:
    """Whose session it is, its key still being good. Raises NotAuthorizedException, Unavailable, RedisError."""
    token = request.cookies.get(COOKIE, "")
    session = await console_sessions.find(services.redis, token) if token else None
    if session is None:
        raise NotAuthorizedException
    async with connection(services.pool) as conn:
        owner = await users.find_key(conn, session.prefix)
    if owner is None or not hmac.compare_digest(owner.hash, session.key_hash):
        raise NotAuthorizedException
    return Caller(owner.user_id, owner.scope)


def require_own_form(request: AnyRequest) -> None:
    """Raise PermissionDeniedException unless this POST comes from a page of ours."""
    origin = request.headers.get("origin", "")
    if origin:
        own = urlsplit(origin).netloc == request.headers.get("host", "")
    else:
        own = request.headers.get("sec-fetch-site", "") == "same-origin"
    if not own:
        raise PermissionDeniedException("this form was not sent from the console's own page; open the console and try again")


def cookie(request: AnyRequest, token: str) -> Cookie:
    """The session's cookie; an empty token takes it away."""
    return Cookie(
        key=COOKIE,
        value=token,
        path="/",
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        max_age=console_sessions.LIFETIME_SECONDS if token else 0,
    )

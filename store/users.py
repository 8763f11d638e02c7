"""Users and their API keys. A key is shown once; the database holds its SHA-256 and a prefix to find it by (S9)."""

import hashlib
import hmac
import os
import secrets
from datetime import datetime
from pathlib import Path
from typing import Literal

import asyncpg
import msgspec

from domain.errors import Conflict, Invalid, NotFound
from store.postgres import Pool, PooledConnection, transaction

Scope = Literal["admin", "user"]

ADMIN_NAME = "admin"
_LOCK_ADMIN = 0x51C1AD  # advisory lock: two nodes that start at once make one admin


class User(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever owns lists, delivery servers and campaigns."""

    id: int
    name: str
    email: str
    group_id: int  # the operator's own number of a group of users; 0: in none
    created_at: datetime
    disabled_at: datetime | None


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """An API key without its secret."""

    id: int
    user_id: int
    name: str
    scope: Scope
    prefix: str
    created_at: datetime
    revoked_at: datetime | None


class KeyOwner(msgspec.Struct, frozen=True):
    """What a presented key is checked against."""

    key_id: int
    user_id: int
    scope: Scope
    hash: bytes


_USER = "id, name, email, group_id, created_at, disabled_at"
_KEY = "id, user_id, name, scope, prefix, created_at, revoked_at"


def make_key() -> tuple[str, str, bytes]:
    """A fresh key as (whole text, prefix, hash); the secret part has 256 random bits."""
    prefix = secrets.token_hex(6)
    text = f"slk_{prefix}_{secrets.token_urlsafe(32)}"
    return text, prefix, hash_key(text)


def hash_key(text: str) -> bytes:
    """What is kept of a key. A plain hash is enough for 256 random bits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def prefix_of(text: str) -> str | None:
    """What a key is found by: the middle of `slk_<prefix>_<secret>`; None when it cannot be a key.

    An admin key from the settings may have another form; it is found by a part of its hash.
    """
    if not 16 <= len(text) <= 200 or not text.isascii() or not text.isprintable():
        return None
    parts = text.split("_", 2)
    if len(parts) == 3 and parts[0] == "slk" and parts[1].isalnum() and len(parts[2]) >= 32:
        return parts[1]
    return "." + hashlib.sha256(b"prefix " + text.encode()).hexdigest()[:16]


async def create_user(conn: PooledConnection, name: str, email: str = "", group_id: int = 0) -> User:
    """Raises Conflict when the name is taken."""
    try:
        row = await conn.fetchrow(f"insert into users (name, email, group_id) values ($1, $2, $3) returning {_USER}", name, email, group_id)
    except asyncpg.UniqueViolationError:
        raise Conflict(f"a user named {name!r} exists already; choose another name") from None
    assert row is not None
    return User(**dict(row))


async def get_user(conn: PooledConnection, user_id: int) -> User:
    """Raises NotFound."""
    row = await conn.fetchrow(f"select {_USER} from users where id = $1", user_id)
    if row is None:
        raise NotFound("user", user_id)
    return User(**dict(row))


async def list_users(conn: PooledConnection, after: int, limit: int) -> list[User]:
    """By id."""
    return [User(**dict(row)) for row in await conn.fetch(f"select {_USER} from users where id > $1 order by id limit $2", after, limit)]


async def update_user(
    conn: PooledConnection, user_id: int, *, email: str | None, disabled: bool | None, group_id: int | None = None
) -> User:
    """Change what is not None. The keys of a disabled user stop working within 5 s. Raises NotFound."""
    row = await conn.fetchrow(
        "update users set email = coalesce($2, email), disabled_at = case when $3::boolean is null then disabled_at "
        f"when $3 then coalesce(disabled_at, now()) end, group_id = coalesce($4, group_id) where id = $1 returning {_USER}",
        user_id,
        email,
        disabled,
        group_id,
    )
    if row is None:
        raise NotFound("user", user_id)
    return User(**dict(row))


async def create_key(conn: PooledConnection, user_id: int, name: str, scope: Scope) -> tuple[ApiKey, str]:
    """A new key and its whole text, which cannot be read again. Raises NotFound (no such user)."""
    text, prefix, digest = make_key()
    try:
        row = await conn.fetchrow(
            f"insert into api_keys (user_id, name, scope, prefix, hash) values ($1, $2, $3, $4, $5) returning {_KEY}",
            user_id,
            name,
            scope,
            prefix,
            digest,
        )
    except asyncpg.ForeignKeyViolationError:
        raise NotFound("user", user_id) from None
    assert row is not None
    return ApiKey(**dict(row)), text


async def list_keys(conn: PooledConnection, user_id: int) -> list[ApiKey]:
    """Every key of a user, revoked ones too, by id."""
    return [ApiKey(**dict(row)) for row in await conn.fetch(f"select {_KEY} from api_keys where user_id = $1 order by id", user_id)]


async def revoke_key(conn: PooledConnection, user_id: int, key_id: int) -> None:
    """It stops working everywhere within 5 s; revoking twice is fine. Raises NotFound."""
    done = await conn.execute(
        "update api_keys set revoked_at = coalesce(revoked_at, now()) where id = $1 and user_id = $2", key_id, user_id
    )
    if done == "UPDATE 0":
        raise NotFound("API key", key_id)


async def find_key(conn: PooledConnection, prefix: str) -> KeyOwner | None:
    """The key with this prefix, unless it is revoked or its user disabled."""
    row = await conn.fetchrow(
        "select k.id, k.user_id, k.scope, k.hash from api_keys k join users u on u.id = k.user_id "
        "where k.prefix = $1 and k.revoked_at is null and u.disabled_at is null",
        prefix,
    )
    return None if row is None else KeyOwner(*row)


async def admin_id(conn: PooledConnection) -> int:
    """The user `admin`, made where there is none yet; in a transaction, in which nobody else makes one."""
    found = await conn.fetchval("select id from users where name = $1", ADMIN_NAME)
    if found is None:
        await conn.execute("select pg_advisory_xact_lock($1)", _LOCK_ADMIN)
        found = await conn.fetchval("select id from users where name = $1", ADMIN_NAME)
    return int(found) if found is not None else (await create_user(conn, ADMIN_NAME)).id


async def ensure_admin(pool: Pool, path: Path, given: str = "") -> str:
    """Make sure there is a user `admin` with a working admin key, and return that key's text.

    The key is `given` (settings control.admin_key) or the one in the file `path`, which is made (mode 0600) when missing.
    Safe to call at every start and from several nodes at once. Raises Invalid when it cannot be a key.
    """
    text = given.strip()
    if not text and path.exists():
        text = path.read_text("ascii").strip()
    prefix = prefix_of(text) if text else None
    if text and prefix is None:
        where = "control.admin_key" if given else str(path)
        raise Invalid(where, "must be 16 to 200 ASCII characters without line breaks; leave it empty to have one made")
    if not text:
        text, prefix, _ = make_key()
        _write_secret(path, text)
        text = path.read_text("ascii").strip()  # another process may have been first
        prefix = prefix_of(text)
    async with transaction(pool) as conn:
        await conn.execute("select pg_advisory_xact_lock($1)", _LOCK_ADMIN)
        user_id = await admin_id(conn)
        stored = await conn.fetchrow("select user_id, hash, scope from api_keys where prefix = $1", prefix)
        if stored is None:
            await conn.execute(
                "insert into api_keys (user_id, name, scope, prefix, hash) values ($1, 'first admin key', 'admin', $2, $3)",
                user_id,
                prefix,
                hash_key(text),
            )
        elif not hmac.compare_digest(stored["hash"], hash_key(text)):
            raise Invalid("control.admin_key", "another key has the same prefix; change the part between the underscores")
    return text


def _write_secret(path: Path, text: str) -> None:
    """Make the file whole or not at all; whoever comes second finds the first one's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()

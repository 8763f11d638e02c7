"""Users and API keys. Admins manage all of them; a user manages their own keys."""

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from litestar import Controller, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import JSONBody
from msgspec import UNSET, UnsetType

from control.guards import Caller, requires_admin
from control.parameters import MAX_ID, After, Id, Limit, Page, given, one_line
from control.services import Services
from domain import address
from domain.errors import Invalid, NotFound
from store import users
from store.postgres import connection, transaction

Group = Annotated[
    int, msgspec.Meta(ge=0, le=MAX_ID, description="Your own number of a group of users, for %UserGroup:ID%; 0: in none", examples=[3])
]


class UserCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new user."""

    name: str
    email: str = ""
    group_id: Group = 0


class UserUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes; the keys of a disabled user stop working within 5 s."""

    email: str | UnsetType = UNSET
    group_id: Group | UnsetType = UNSET
    disabled: bool | UnsetType = UNSET


class ApiKeyCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new key; only an admin makes keys of admin scope."""

    name: str = ""
    scope: Literal["admin", "user"] = "user"


class ApiKeyCreated(msgspec.Struct, frozen=True, kw_only=True):
    """A key with its text, which is shown this once."""

    id: int
    user_id: int
    name: str
    scope: Literal["admin", "user"]
    prefix: str
    key: str
    created_at: datetime


class Me(msgspec.Struct, frozen=True, kw_only=True):
    """Whose key this is."""

    user: users.User
    scope: Literal["admin", "user"]


class MeController(Controller):
    """Who am I?"""

    path = "/me"
    tags = ("users",)

    @get("/", operation_id="getMe", summary="The user and scope of this API key")
    async def me(self, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Me:
        """The user the key belongs to."""
        async with connection(services.pool) as conn:
            return Me(user=await users.get_user(conn, caller.user_id), scope=caller.scope)


class UserController(Controller):
    """Users; admins only."""

    path = "/users"
    tags = ("users",)
    guards = (requires_admin,)

    @post("/", operation_id="createUser", summary="Create a user")
    async def create(self, data: JSONBody[UserCreate], services: NamedDependency[Services]) -> users.User:
        """A user without keys; make one with POST /users/{user_id}/api-keys."""
        name = one_line("name", data.name, minimum=1)
        async with transaction(services.pool) as conn:
            return await users.create_user(conn, name, _email(data.email), data.group_id)

    @get("/", operation_id="listUsers", summary="List users")
    async def page(self, services: NamedDependency[Services], after: After = 0, limit: Limit = 100) -> Page[users.User]:
        """By id."""
        async with connection(services.pool) as conn:
            found = await users.list_users(conn, after, limit)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/{user_id:int}", operation_id="getUser", summary="One user")
    async def one(self, user_id: Id, services: NamedDependency[Services]) -> users.User:
        """By id."""
        async with connection(services.pool) as conn:
            return await users.get_user(conn, user_id)

    @patch("/{user_id:int}", operation_id="updateUser", summary="Change or disable a user")
    async def update(
        self, user_id: Id, data: JSONBody[UserUpdate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> users.User:
        """Fields that are left out stay."""
        fields = given(data)
        email = fields.get("email")
        disabled = fields.get("disabled")
        group_id = fields.get("group_id")
        if disabled and user_id == caller.user_id:
            raise Invalid("disabled", "you cannot disable yourself")
        async with transaction(services.pool) as conn:
            return await users.update_user(
                conn,
                user_id,
                email=_email(email) if isinstance(email, str) else None,
                disabled=disabled if isinstance(disabled, bool) else None,
                group_id=group_id if isinstance(group_id, int) else None,
            )


class ApiKeyController(Controller):
    """The keys of one user."""

    path = "/users/{user_id:int}/api-keys"
    tags = ("users",)

    @post("/", operation_id="createApiKey", summary="Create an API key")
    async def create(
        self, user_id: Id, data: JSONBody[ApiKeyCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> ApiKeyCreated:
        """The answer shows the key; it cannot be read again."""
        _check_own(caller, user_id)
        if data.scope == "admin" and caller.scope != "admin":
            raise Invalid("scope", "only a key of admin scope can make another one")
        name = one_line("name", data.name)
        async with transaction(services.pool) as conn:
            key, text = await users.create_key(conn, user_id, name, data.scope)
        return ApiKeyCreated(
            id=key.id, user_id=user_id, name=key.name, scope=key.scope, prefix=key.prefix, key=text, created_at=key.created_at
        )

    @get("/", operation_id="listApiKeys", summary="List API keys")
    async def page(self, user_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Page[users.ApiKey]:
        """All of them, revoked ones too, without their secrets."""
        _check_own(caller, user_id)
        async with connection(services.pool) as conn:
            await users.get_user(conn, user_id)
            return Page(await users.list_keys(conn, user_id), None)

    @delete("/{key_id:int}", operation_id="revokeApiKey", summary="Revoke an API key")
    async def revoke(self, user_id: Id, key_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """It stops working everywhere within 5 s."""
        _check_own(caller, user_id)
        async with transaction(services.pool) as conn:
            await users.revoke_key(conn, user_id, key_id)


def _check_own(caller: Caller, user_id: int) -> None:
    if caller.scope != "admin" and caller.user_id != user_id:
        raise NotFound("user", user_id)


def _email(text: str) -> str:
    return address.parse(text).text if text else ""

"""Lists, their custom fields and their subscribers, one at a time; many at once come through imports."""

from datetime import datetime
from typing import Annotated

import msgspec
from litestar import Controller, Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter
from msgspec import UNSET, UnsetType

from control.guards import Caller
from control.parameters import After, Id, Limit, Page, given, one_line
from control.services import Services
from domain import address
from domain.errors import Invalid
from domain.import_rows import FIELD_NAME, FIELD_NAME_RULE, Kind, check_values
from store import lists, subscribers
from store.postgres import PooledConnection, connection, transaction
from store.subscribers import Subscriber, SubscriberState


class ListCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new list. The sender is what its campaigns use where they or their delivery server name none."""

    name: str
    sender_name: str = ""
    sender_email: str = ""


class ListUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes."""

    name: str | UnsetType = UNSET
    sender_name: str | UnsetType = UNSET
    sender_email: str | UnsetType = UNSET


class ListShown(msgspec.Struct, frozen=True, kw_only=True):
    """A list and how many subscribers it has in each state (subscribed, unsubscribed, bounced)."""

    id: int
    user_id: int
    name: str
    sender_name: str
    sender_email: str
    created_at: datetime
    subscribers: dict[str, int]


class CustomFieldCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A new field of merge data."""

    name: str
    kind: Kind = "text"


class SubscriberCreate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One address and its merge data; fields must be those of the list."""

    email: str
    data: dict[str, str | int | float | bool | list[str] | None] = {}


class SubscriberUpdate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What changes: fields named in `data`, and the state."""

    data: dict[str, str | int | float | bool | list[str] | None] | UnsetType = UNSET
    state: SubscriberState | UnsetType = UNSET


class ListController(Controller):
    """The lists of one user."""

    path = "/lists"
    tags = ("lists",)

    @post("/", operation_id="createList", summary="Create a list")
    async def create(self, data: JSONBody[ListCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]) -> lists.List:
        """An empty list with the custom fields that every list begins with (`control.default_custom_fields`)."""
        fields = _checked({name: getattr(data, name) for name in data.__struct_fields__})
        async with transaction(services.pool) as conn:
            made = await lists.create(conn, caller.user_id, fields["name"], fields["sender_name"], fields["sender_email"])
            for name in services.settings.control.default_custom_fields:
                await lists.create_field(conn, caller.user_id, made.id, _field_name(name, "control.default_custom_fields"), "text")
        return made

    @get("/", operation_id="listLists", summary="List lists")
    async def page(
        self, caller: NamedDependency[Caller], services: NamedDependency[Services], after: After = 0, limit: Limit = 100
    ) -> Page[lists.List]:
        """By id."""
        async with connection(services.pool) as conn:
            found = await lists.list_lists(conn, caller.sees, after, limit)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/{list_id:int}", operation_id="getList", summary="One list and its size")
    async def one(self, list_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> ListShown:
        """By id."""
        async with connection(services.pool) as conn:
            found = await lists.get(conn, caller.sees, list_id)
            return ListShown(**msgspec.structs.asdict(found), subscribers=await subscribers.count(conn, list_id))

    @patch("/{list_id:int}", operation_id="updateList", summary="Change a list")
    async def update(
        self, list_id: Id, data: JSONBody[ListUpdate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> lists.List:
        """Fields that are left out stay."""
        async with transaction(services.pool) as conn:
            return await lists.update(conn, caller.sees, list_id, dict(_checked(given(data))))

    @delete("/{list_id:int}", operation_id="deleteList", summary="Delete a list")
    async def remove(self, list_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """Refused while a campaign that has not ended needs it."""
        async with transaction(services.pool) as conn:
            await lists.delete(conn, caller.sees, list_id)


class CustomFieldController(Controller):
    """The merge fields of a list."""

    path = "/lists/{list_id:int}/fields"
    tags = ("lists",)

    @post("/", operation_id="createCustomField", summary="Create a custom field")
    async def create(
        self, list_id: Id, data: JSONBody[CustomFieldCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> lists.CustomField:
        """Templates name it `{{ name }}`."""
        _field_name(data.name, "name")
        async with transaction(services.pool) as conn:
            return await lists.create_field(conn, caller.sees, list_id, data.name, data.kind)

    @get("/", operation_id="listCustomFields", summary="List custom fields")
    async def page(self, list_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> Page[lists.CustomField]:
        """All of them."""
        async with connection(services.pool) as conn:
            return Page(await lists.fields(conn, caller.sees, list_id), None)

    @delete("/{field_id:int}", operation_id="deleteCustomField", summary="Delete a custom field")
    async def remove(self, list_id: Id, field_id: Id, caller: NamedDependency[Caller], services: NamedDependency[Services]) -> None:
        """Values already stored stay with their subscribers."""
        async with transaction(services.pool) as conn:
            await lists.delete_field(conn, caller.sees, list_id, field_id)


class SubscriberController(Controller):
    """The subscribers of a list."""

    path = "/lists/{list_id:int}/subscribers"
    tags = ("subscribers",)

    @post("/", operation_id="addSubscriber", summary="Add or change one subscriber")
    async def add(
        self, list_id: Id, data: JSONBody[SubscriberCreate], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> Response[Subscriber]:
        """201 when new; 200 when the address was on the list, whose named fields change. Who unsubscribed stays unsubscribed."""
        found = address.parse(data.email)
        async with transaction(services.pool) as conn:
            owner = await lists.get(conn, caller.sees, list_id)
            values = check_values(dict(data.data), {field.name: field.kind for field in await lists.fields(conn, None, list_id)})
            subscriber, fresh = await subscribers.add(conn, owner.user_id, list_id, found, values)
        return Response(subscriber, status_code=201 if fresh else 200)

    @get("/", operation_id="listSubscribers", summary="List subscribers")
    async def page(
        self,
        list_id: Id,
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
        after: After = 0,
        limit: Limit = 100,
        in_state: Annotated[SubscriberState | None, QueryParameter(name="state")] = None,
    ) -> Page[Subscriber]:
        """By id; of one state where given."""
        async with connection(services.pool) as conn:
            await lists.get(conn, caller.sees, list_id)
            found = await subscribers.list_subscribers(conn, list_id, after, limit, in_state)
        return Page(found, found[-1].id if len(found) == limit else None)

    @get("/{subscriber:str}", operation_id="getSubscriber", summary="One subscriber, by id or address")
    async def one(
        self, list_id: Id, subscriber: FromPath[str], caller: NamedDependency[Caller], services: NamedDependency[Services]
    ) -> Subscriber:
        """An address is found without regard to case."""
        async with connection(services.pool) as conn:
            await lists.get(conn, caller.sees, list_id)
            return await _find(conn, list_id, subscriber)

    @patch("/{subscriber:str}", operation_id="updateSubscriber", summary="Change one subscriber")
    async def update(
        self,
        list_id: Id,
        subscriber: FromPath[str],
        data: JSONBody[SubscriberUpdate],
        caller: NamedDependency[Caller],
        services: NamedDependency[Services],
    ) -> Subscriber:
        """Unsubscribing here does not suppress the address; POST /suppressions does."""
        async with transaction(services.pool) as conn:
            owner = await lists.get(conn, caller.sees, list_id)
            found = await _find(conn, list_id, subscriber)
            if not isinstance(data.data, UnsetType):
                values = check_values(dict(data.data), {field.name: field.kind for field in await lists.fields(conn, None, list_id)})
                found, _ = await subscribers.add(conn, owner.user_id, list_id, address.parse(found.email), values)
            if not isinstance(data.state, UnsetType):
                found = await subscribers.set_state(conn, list_id, found.id, data.state)
        return found


def _field_name(name: str, field: str) -> str:
    if not FIELD_NAME(name) or name == "email":
        raise Invalid(field, f"{FIELD_NAME_RULE}; `email` is the address itself", name)
    return name


async def _find(conn: PooledConnection, list_id: int, text: str) -> Subscriber:
    if text.isascii() and text.isdigit() and len(text) <= 19 and int(text) < 2**63:
        return await subscribers.get(conn, list_id, int(text))
    return await subscribers.get(conn, list_id, None, address.key(text, "subscriber"))


def _checked(fields: dict[str, object]) -> dict[str, str]:
    """Raises Invalid."""
    done: dict[str, str] = {}
    for name, value in fields.items():
        assert isinstance(value, str)
        if name == "sender_email":
            done[name] = address.parse(value, name).text if value else ""
        else:
            done[name] = one_line(name, value, minimum=1 if name == "name" else 0)
    return done

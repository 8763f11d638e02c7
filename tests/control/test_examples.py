"""control.examples: each operation that takes a body shows one, which its route takes."""

import re

import msgspec
from litestar.handlers import HTTPRouteHandler

from control.app import Application
from control.bodies import check_json
from control.examples import EXAMPLES
from control.openapi import finished
from tests.control.conftest import Client

# What the examples refer to as 1 comes first
ORDER = (
    "createList", "createCustomField", "createDeliveryServer", "createUser", "createApiKey", "addSubscriber", "importSubscribers",
    "createDkimKey", "createCustomHeader", "addBouncePattern", "createCampaign", "sendMessage", "streamMessage", "addSeed",
    "putForwarding", "importResults",
)  # fmt: skip
NEEDS_MORE = {"testDeliveryServer", "updateUser"}  # a server that answers; somebody else


def handlers(app: Application) -> dict[str, HTTPRouteHandler]:
    found = [handler for route in app.litestar.routes for handler in getattr(route, "route_handlers", ())]
    return {str(handler.operation_id): handler for handler in found if isinstance(handler, HTTPRouteHandler)}


def test_every_operation_with_a_body_shows_examples_that_its_type_takes(app: Application) -> None:
    document = finished(app.litestar.openapi_schema.to_schema())
    operations = {each["operationId"]: each for path in document["paths"].values() for each in path.values()}
    with_body = {name for name, operation in operations.items() if "requestBody" in operation}
    assert with_body == set(EXAMPLES)
    of_route = handlers(app)
    for name in with_body:
        for kind, described in operations[name]["requestBody"]["content"].items():
            assert described["examples"], (name, kind)
            for title, example in described["examples"].items():
                assert re.fullmatch(r"[A-Za-z][A-Za-z0-9 ]+", title), "a name, as Swagger shows it"
                if kind == "application/json":
                    body = msgspec.json.encode(example["value"])
                    check_json(body)
                    field = of_route[name].parsed_data_field
                    assert field is not None
                    msgspec.json.decode(body, type=field.annotation)


async def test_the_examples_are_taken_as_they_stand(app: Application, admin: Client) -> None:
    document = finished(app.litestar.openapi_schema.to_schema())
    routes = {each["operationId"]: (method, path) for path, item in document["paths"].items() for method, each in item.items()}
    named = {"subscriber": "ada@reader.example.com"}
    for name in (*ORDER, *sorted(set(EXAMPLES) - set(ORDER) - NEEDS_MORE)):
        method, path = routes[name]
        path = re.sub(r"\{(\w+)\}", lambda match: named.get(match[1], "1"), path.removeprefix("/api/v1"))
        for kind, examples in EXAMPLES[name].items():
            for title, value in examples.items():
                body = value.encode() if isinstance(value, str) else msgspec.json.encode(value)
                answer = await admin.call(method.upper(), path, content=body, headers={"content-type": kind})
                assert answer.status_code in (200, 201, 202), (name, title, answer.text)
                if isinstance(answer.json(), dict):
                    assert not answer.json().get("refused"), (name, title, answer.text)


def test_the_examples_name_nobody_who_exists() -> None:
    text = msgspec.json.encode(EXAMPLES).decode()
    hosts = re.findall(r"[@/]((?:[a-z0-9-]+\.)+[a-z]+)", text)
    assert hosts
    assert all(host.endswith((".example.com", "example.org")) for host in hosts), hosts

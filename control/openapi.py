"""How the API describes itself: the OpenAPI document, and the page at /docs that shows it without asking any other host."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
from litestar import Request
from litestar.enums import OpenAPIMediaType
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import OpenAPIRenderPlugin
from litestar.openapi.spec import Components, SecurityScheme, Tag

from control import examples
from control.errors import MEDIA_TYPE

API_VERSION = "1"
STATIC = Path(__file__).parent / "static" / "swagger"

_METHODS = ("get", "post", "put", "patch", "delete")
_PAGE_NAME = re.compile(r"Page_(?:\w+\.)*(\w+)_")

DESCRIPTION = """
Send bulk mail: delivery servers, lists, imports, campaigns, suppressions.

* Every request carries `Authorization: Bearer slk_...`. What belongs to somebody else does not exist for you.
* Errors are `application/problem+json` (RFC 9457); `errors[].field` names what is to blame, the way you wrote it.
* Every POST may carry an `Idempotency-Key`: sent again within 24 hours it has no second effect and gets the same answer with
  `Idempotent-Replayed: true`. With another body it is refused (422); while the first is under way, or if nobody knows how it
  ended, 409. A streamed body is compared by path, type and length of the body, not by its content.
* Lists come in pages: pass `next` as `after` (or `before`) until it is null.
""".strip()


class OfflineSwagger(OpenAPIRenderPlugin):
    """The page at /docs: Swagger UI from this host, nothing from any other."""

    def __init__(self) -> None:
        super().__init__(path="/")
        self._page = (STATIC / "index.html").read_bytes()

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The page is the same whatever the schema; its script fetches the JSON."""
        return self._page


class Document(OpenAPIRenderPlugin):
    """/docs/openapi.json."""

    def __init__(self) -> None:
        super().__init__(path="/openapi.json", media_type=OpenAPIMediaType.OPENAPI_JSON)

    def render(self, request: Request[Any, Any, Any], openapi_schema: dict[str, Any]) -> bytes:
        """The document as `finished` makes it."""
        return msgspec.json.encode(finished(openapi_schema))


def finished(schema: dict[str, Any]) -> dict[str, Any]:
    """The framework's document with what it cannot know: our problems, streamed bodies, examples, readable names."""
    text = msgspec.json.encode(schema).decode()
    document: dict[str, Any] = msgspec.json.decode(_PAGE_NAME.sub(r"\1Page", text))
    for component in document["components"]["schemas"].values():
        component.pop("default", None)  # of one field that uses the component; whether it is there depends on the hash seed
    problem = {"content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if method not in _METHODS:
                continue
            responses = operation["responses"]
            responses.pop("400", None)  # the framework's own shape, which we never send
            if path.startswith("/api/"):
                responses["401"] = {"description": "No valid API key", **problem}
                responses["default"] = {"description": "Refused or failed (RFC 9457)", **problem}
            examples.add_to(operation)
            if method == "post" and path.startswith("/api/"):
                key = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 255}}
                operation.setdefault("parameters", []).append(key)
    return document


def openapi_config() -> OpenAPIConfig:
    """How the API describes itself at /docs and /docs/openapi.json; `docs/openapi.json` is a copy."""
    return OpenAPIConfig(
        title="Sluice API",
        version=API_VERSION,
        description=DESCRIPTION,
        path="/docs",
        render_plugins=[OfflineSwagger(), Document()],
        security=[{"apiKey": []}],
        components=Components(
            security_schemes={
                "apiKey": SecurityScheme(type="http", scheme="bearer", description="`slk_<prefix>_<secret>`; the first one is in admin.key")
            }
        ),
        tags=[
            Tag("delivery servers", "Ways out: SMTP servers with credentials, domains and limits"),
            Tag("custom headers", "Header fields added to all mail, or to some of it"),
            Tag("DKIM keys", "Keys that sign the mail of a domain, and their DNS records"),
            Tag("lists", "Lists and their merge fields"),
            Tag("subscribers", "One at a time; many at once by import"),
            Tag("imports", "CSV or NDJSON of any size"),
            Tag("campaigns", "Create, start, pause, resume, cancel"),
            Tag("messages", "Mail to named recipients at once: receipts, passwords, alerts"),
            Tag("conversions", "What trackers report about followed links"),
            Tag("seed list", "Addresses that get a copy of every campaign"),
            Tag("reports", "Progress and outcomes"),
            Tag("suppressions", "Addresses that must not be mailed"),
            Tag("bounces", "What operators say about refusals, and results that others report"),
            Tag("inbound", "What came back: received mail, bounces, complaints"),
            Tag("users", "Users and API keys"),
            Tag("health", "For load balancers and operators"),
        ],
    )


def main() -> None:
    """`python -m control.openapi`: the document on standard output, as it is kept in docs/openapi.json."""
    from config.keys import Keyring
    from config.settings import Settings
    from control.app import create_app

    stores: Any = None  # describing the routes asks nothing of a store
    app = create_app(stores, stores, Keyring(bytes(32)), Settings())
    text = json.dumps(finished(app.litestar.openapi_schema.to_schema()), indent=1, sort_keys=True, ensure_ascii=False)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()

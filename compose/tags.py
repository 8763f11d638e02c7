"""Merge tags of the form `%Subscriber:FirstName%`, as users of older products know them (requirements 48-64).

They may stand anywhere in the text of a template and mean an output expression there: escaped in HTML, empty when there is
no value, never left in the message. `%Word:Word%` is a tag whatever the words; `%sender_domain%` is the one without a
colon. Everything else with a percent sign (`width="100%"`, `%20`) is text.
"""

import hmac
import re
from collections.abc import Callable
from typing import Any, Final

from liquid import Environment, RenderContext
from liquid.ast import Node
from liquid.builtin.content import ContentNode
from liquid.builtin.output import OutputNode
from liquid.expression import Expression
from liquid.token import Token

# Three letters at least: `%AB:` begins with an escaped octet of a URL.
TAG: Final = re.compile(r"%([A-Za-z][A-Za-z_]{2,40}):([A-Za-z][A-Za-z0-9_]{0,60})%|%sender_domain%", re.IGNORECASE)
HASH_DIGITS: Final = 16

Value = Callable[[dict[str, Any]], object]


def plain(name: str) -> str:
    """The form in which names are compared: without case and underscores."""
    return name.replace("_", "").lower()


def hashed(key: bytes, kind: str, identity: object) -> str:
    """A short name for an id that tells nothing about it: 16 hex digits of HMAC-SHA256."""
    return hmac.digest(key, f"{kind}:{identity}".encode(), "sha256").hex()[:HASH_DIGITS]


class TagExpression(Expression):
    """The value of one tag; `function` takes the global variables of a rendering."""

    __slots__ = ("function", "text")

    def __init__(self, token: Token, text: str, function: Value) -> None:
        super().__init__(token)
        self.text = text
        self.function = function

    def __str__(self) -> str:
        return self.text

    def evaluate(self, context: RenderContext) -> object:
        """The value, or "" where there is none."""
        return self.function(context.globals)  # type: ignore[arg-type]

    def children(self) -> list[Expression]:
        """A tag has no parts."""
        return []


def _field(wanted: str) -> Value:
    """The custom field whose name is `wanted` without case and underscores."""
    found = ""

    def value(scope: dict[str, Any]) -> object:
        nonlocal found
        subscriber = scope["subscriber"]
        if found not in subscriber:
            found = next((name for name in subscriber if plain(name) == wanted), "")
            if not found:
                return ""
        held = subscriber[found]
        return "" if held is None else held

    return value


class Tags:
    """Knows the tags of one campaign. `constants` are the global variables that are the same for every recipient."""

    def __init__(self, key: bytes, constants: dict[str, Any], sender_domain: str) -> None:
        self.key = key
        self.sender_domain = sender_domain
        self.used = False  # a tag was found that looks at the subscriber
        ids = {kind: constants[kind].get("id", "") for kind in ("user", "campaign", "list")}
        self.fixed: dict[tuple[str, str], object] = {
            ("campaign", "campaignname"): constants["campaign"]["name"],
            ("campaign", "name"): constants["campaign"]["name"],
            ("list", "listname"): constants["list"]["name"],
            ("list", "name"): constants["list"]["name"],
        }
        for kind, identity in ids.items():
            self.fixed[kind, "id"] = self.fixed[kind, f"{kind}id"] = identity
            self.fixed[kind, f"hashed{kind}id"] = hashed(key, kind, identity)

    def value(self, kind: str, name: str) -> Value:
        """The function behind `%kind:name%`; it yields "" for what there is not."""
        kind, name = plain(kind), plain(name)
        if kind == "subscriber":
            self.used = True
            if name in ("id", "subscriberid"):
                return lambda scope: scope["subscriber"]["id"]
            if name == "hashedsubscriberid":
                return lambda scope: hashed(self.key, "subscriber", scope["subscriber"]["id"])
            return _field("email" if name == "emailaddress" else name)
        known = self.fixed.get((kind, name), "")
        return lambda _scope: known

    def _sender_domain(self, _scope: dict[str, Any]) -> str:
        return self.sender_domain

    def rewrite(self, _env: Environment, node: ContentNode) -> list[Node]:
        """`node` as text and output nodes, the tags in it taken out."""
        matches = list(TAG.finditer(node.text))
        if not matches:
            return [node]
        nodes: list[Node] = []
        at = 0
        for match in matches:
            if match.start() > at:
                nodes.append(ContentNode(node.token, node.text[at : match.start()]))
            value = self.value(match[1], match[2]) if match[1] else self._sender_domain
            nodes.append(OutputNode(node.token, TagExpression(node.token, match[0], value)))
            at = match.end()
        if at < len(node.text):
            nodes.append(ContentNode(node.token, node.text[at:]))
        return nodes

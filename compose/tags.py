"""Merge tags of the form `%Subscriber:FirstName%`, as users of older products know them (requirements 48-64).

They may stand anywhere in the text of a template and mean an output expression there: escaped in HTML, empty when there is
no value, never left in the message. `%Word:Word%` is a tag whatever the words, `%Word:Word|text%` says what stands in for no value;
`%sender_domain%` is the one without a colon. Everything else with a percent sign (`width="100%"`, `%20`) is text.

`[[one|two|three]]` becomes one of the texts, for each recipient of a campaign always the same one.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TextIO

from liquid import Environment, RenderContext
from liquid.ast import BlockNode, Node
from liquid.builtin.content import ContentNode
from liquid.builtin.output import OutputNode
from liquid.expression import Expression
from liquid.token import Token
from markupsafe import Markup

# Three letters at least: `%AB:` begins with an escaped octet of a URL.
TAG: Final = re.compile(
    r"%([A-Za-z][A-Za-z_]{2,40}):([A-Za-z][A-Za-z0-9_]{0,60})(?:\|([^%|\r\n<>]{0,200}))?%|%sender_domain%", re.IGNORECASE
)
CHOICE: Final = re.compile(r"\[\[([^\[\]|]{0,1000}(?:\|[^\[\]|]{0,1000}){1,50})\]\]")
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
        self.campaign_id = constants["campaign"].get("id", "")
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

    def rewrite(self, env: Environment, node: ContentNode) -> list[Node]:
        """`node` as text and output nodes, choices and tags taken out; tags inside a choice are taken out of its own nodes."""
        nodes: list[Node] = []
        for text, choice in _parts(CHOICE, node.text):
            if choice is not None:
                nodes.append(ChoiceNode(node.token, _options(choice[1]), f"{self.campaign_id}:{choice[0]}:"))
                continue
            for part, match in _parts(TAG, text):
                if match is None:
                    nodes.append(ContentNode(node.token, part))
                else:
                    nodes.append(OutputNode(node.token, TagExpression(node.token, match[0], self._value_of(env, match))))
        return nodes

    def _value_of(self, env: Environment, match: re.Match[str]) -> Value:
        if not match[1]:
            return self._sender_domain
        value = self.value(match[1], match[2])
        if not match[3]:
            return value
        fallback = Markup(match[3]) if env.autoescape else match[3]  # it stands in the template, so it is text of the template
        return lambda scope: value(scope) or fallback


class ChoiceNode(Node):
    """`[[one|two]]`: one of its blocks, by campaign, recipient and what the choice says."""

    __slots__ = ("blocks", "seed")

    def __init__(self, token: Token, options: list[str], seed: str) -> None:
        super().__init__(token)
        self.blank = False
        self.blocks = [BlockNode(token, [ContentNode(token, text)] if text else []) for text in options]
        self.seed = seed

    def chosen(self, scope: dict[str, Any]) -> int:
        """Which block this recipient gets."""
        who = scope.get("subscriber", {}).get("id", "")
        return int.from_bytes(hashlib.sha256(f"{self.seed}{who}".encode()).digest()[:8], "big") % len(self.blocks)

    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        """Where python-liquid renders the block around it."""
        return self.blocks[self.chosen(context.globals)].render(context, buffer)  # type: ignore[arg-type]

    def children(self, static_context: RenderContext, *, include_partials: bool = True) -> Iterable[Node]:
        """Its blocks."""
        return self.blocks


def _options(text: str) -> list[str]:
    """The texts between the bars, but for bars inside a tag."""
    options = [""]
    for part, tag in _parts(TAG, text):
        first, *others = [tag[0]] if tag is not None else part.split("|")
        options[-1] += first
        options += others
    return options


def _parts(pattern: re.Pattern[str], text: str) -> Iterator[tuple[str, re.Match[str] | None]]:
    """`text` in its order: pieces between the matches, and the matches."""
    at = 0
    for match in pattern.finditer(text):
        if match.start() > at:
            yield text[at : match.start()], None
        yield "", match
        at = match.end()
    if at < len(text):
        yield text[at:], None

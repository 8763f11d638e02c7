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

from ext.recipient import loosely

# Three letters at least: `%AB:` begins with an escaped octet of a URL.
TAG: Final = re.compile(
    r"%([A-Za-z][A-Za-z_]{2,40}):([A-Za-z][A-Za-z0-9_]{0,60})(?:\|([^%|\r\n<>]{0,200}))?%|%sender_domain%", re.IGNORECASE
)
CHOICE: Final = re.compile(r"\[\[([^\[\]|]{0,1000}(?:\|[^\[\]|]{0,1000}){1,50})\]\]")
HASH_DIGITS: Final = 16
KINDS: Final = ("user", "user_group", "campaign", "list")  # what tags say of them is the same for every recipient


def hashed(key: bytes, kind: str, identity: object) -> str:
    """A short name for an id that tells nothing about it: 16 hex digits of HMAC-SHA256."""
    return hmac.digest(key, f"{kind}:{identity}".encode(), "sha256").hex()[:HASH_DIGITS]


class TagExpression(Expression):
    """One tag: the same for everybody (`constant`), made of the subscriber's id by `function`, or the subscriber's `field`.

    `fallback` stands in for no value.
    """

    __slots__ = ("constant", "fallback", "field", "function", "text")

    def __init__(
        self,
        token: Token,
        text: str,
        *,
        constant: object = None,
        field: str = "",
        function: Callable[[object], object] | None = None,
        fallback: str = "",
    ) -> None:
        super().__init__(token)
        self.text = text
        self.constant = constant
        self.field = field
        self.function = function
        self.fallback = fallback

    def __str__(self) -> str:
        return self.text

    @property
    def own(self) -> bool:
        """Whether the field is one that every subscriber has, under just this name."""
        return self.field in ("id", "email")

    def evaluate(self, context: RenderContext) -> object:
        """The value, or the fallback or "" where there is none."""
        value = self.constant
        if self.field or self.function:
            subscriber: dict[str, Any] = context.globals["subscriber"]  # type: ignore[assignment]
            if self.function is not None:
                value = self.function(subscriber["id"])
            elif self.own:
                value = subscriber[self.field]
            else:
                value = next((held for name, held in reversed(subscriber.items()) if loosely(name) == self.field), None)
        return self.fallback if value is None or value is False or value in ("", [], {}) else value

    def children(self) -> list[Expression]:
        """A tag has no parts."""
        return []


class Tags:
    """Knows the tags of one campaign. `constants` are the global variables that are the same for every recipient."""

    def __init__(self, key: bytes, constants: dict[str, Any], sender_domain: str) -> None:
        self.key = key
        self.sender_domain = sender_domain
        self.campaign_id = constants["campaign"].get("id", "")
        self.used = False  # a tag was found that looks at the subscriber
        self.fixed: dict[tuple[str, str], object] = {
            ("campaign", "campaignname"): constants["campaign"].get("name", ""),
            ("campaign", "name"): constants["campaign"].get("name", ""),
            ("list", "listname"): constants["list"].get("name", ""),
            ("list", "name"): constants["list"].get("name", ""),
            ("user", "emailaddress"): constants["user"].get("email", ""),
        }
        for kind in KINDS:
            identity, plain = constants[kind].get("id", ""), loosely(kind)
            self.fixed[plain, "id"] = self.fixed[plain, f"{plain}id"] = identity
            self.fixed[plain, f"hashed{plain}id"] = hashed(key, plain, identity) if identity != "" else ""

    def expression(self, env: Environment, token: Token, match: re.Match[str]) -> TagExpression:
        """What a match of TAG stands for; a tag that nobody knows is empty."""
        if not match[1]:
            return TagExpression(token, match[0], constant=self.sender_domain)
        kind, name = loosely(match[1]), loosely(match[2])
        fallback = match[3] or ""
        if env.autoescape:
            fallback = Markup(fallback)  # it stands in the template, so it is text of the template
        if kind != "subscriber":
            return TagExpression(token, match[0], constant=self.fixed.get((kind, name), ""), fallback=fallback)
        self.used = True
        if name == "hashedsubscriberid":
            return TagExpression(token, match[0], function=lambda identity: hashed(self.key, "subscriber", identity))
        return TagExpression(token, match[0], field={"subscriberid": "id", "emailaddress": "email"}.get(name, name), fallback=fallback)

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
                    nodes.append(OutputNode(node.token, self.expression(env, node.token, match)))
        return nodes


class ChoiceNode(Node):
    """`[[one|two]]`: one of its blocks, by campaign, recipient and what the choice says."""

    __slots__ = ("blocks", "seed")

    def __init__(self, token: Token, options: list[str], seed: str) -> None:
        super().__init__(token)
        self.blank = False
        self.blocks = [BlockNode(token, [ContentNode(token, text)] if text else []) for text in options]
        self.seed = seed

    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        """As `ext.template.Choice`, where python-liquid renders the block around it."""
        subscriber: Any = context.globals.get("subscriber", {})
        digest = hashlib.sha256(f"{self.seed}{subscriber.get('id', '')}".encode()).digest()
        return self.blocks[int.from_bytes(digest[:8], "big") % len(self.blocks)].render(context, buffer)

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

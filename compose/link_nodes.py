"""The marks of `compose.link_rewriting` in a parsed template, replaced by what writes the links.

A followed link and the pixel become text and the recipient's token; the nodes of an address with merge tags become one node, whose text
is turned into the address that is sent. Values in an address are percent-encoded: as a part of it, or as a whole address where nothing
but a scheme and a host stands before them. An address that begins in one block and ends in another is left as it stands.
"""

import re
from collections.abc import Iterable
from typing import Final, TextIO

from liquid import RenderContext
from liquid.ast import BlockNode, Node
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import Path
from liquid.builtin.output import OutputNode
from liquid.builtin.tags.echo_tag import EchoNode
from liquid.stringify import to_liquid_string
from liquid.token import Token
from markupsafe import Markup, escape

from compose.link_rewriting import CLICK_TOKEN, MARK, OPEN_TOKEN, Destination, Tracking
from ext.body import url_encoded

PIXEL_BEFORE = '<img src="'
PIXEL_AFTER = '" width="1" height="1" border="0" alt="" style="display:block;width:1px;height:1px">'

READY: Final = frozenset(("url_encode", "safe"))  # filters whose answer stands in an address as it is
UNCODED: Final = "raw"  # the filter whose answer is escaped for HTML only

# Only this stands before a value that may be a whole address, or its host, or whom a mail goes to
_BEGINNING = re.compile(r"\s*(?:(?:mailto|tel|sms):[^?]*|(?:[A-Za-z][A-Za-z0-9+.\-]*:)?(?://[^/?#]*)?)", re.IGNORECASE)


class ValueNode(OutputNode):
    """A value in an address. `place` is that of `ext.template.Output`: "url", "part", or "link" for one that is only escaped."""

    __slots__ = ("place",)

    def __init__(self, node: OutputNode, place: str) -> None:
        super().__init__(node.token, node.expression)
        self.place = place

    def text(self, value: object) -> str:
        """As `ext.template.Output` writes it."""
        said = to_liquid_string(value, True)
        if self.place == "link":
            return escape(str(said) if isinstance(value, Markup) else Markup(said).unescape())
        return escape(url_encoded(Markup(said).unescape(), component=self.place == "part"))

    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        """Where python-liquid renders the block around it."""
        return buffer.write(self.text(self.expression.evaluate(context)))


class LinkNode(Node):
    """An address with merge tags."""

    __slots__ = ("block", "destination")

    def __init__(self, token: Token, nodes: list[Node], destination: Destination) -> None:
        super().__init__(token)
        self.block = BlockNode(token, nodes)
        self.blank = False
        self.destination = destination

    def render_to_output(self, context: RenderContext, buffer: TextIO) -> int:
        """As `ext.template.Mapped`, where python-liquid renders the block around it."""
        inner = context.get_buffer(buffer)
        self.block.render(context, inner)
        return buffer.write(self.destination(inner.getvalue(), context.globals))  # type: ignore[arg-type]

    def children(self, static_context: RenderContext, *, include_partials: bool = True) -> Iterable[Node]:
        """The address."""
        return [self.block]


class Splicer:
    """Replaces the marks in lists of nodes, for one campaign."""

    def __init__(self, tracking: Tracking | None) -> None:
        self._tracking = tracking

    def __call__(self, nodes: list[Node]) -> list[Node]:
        """The nodes of one block."""
        done: list[Node] = []
        begun: tuple[int, int | None] | None = None  # where in `done` the address begins, and its link's number
        for node in nodes:
            if not isinstance(node, ContentNode) or "\0" not in node.text:
                done.append(node)
                continue
            at = 0
            for match in MARK.finditer(node.text):
                _put(done, node.token, node.text[at : match.start()])
                at = match.end()
                if match[1] in "AB":
                    begun = len(done), int(match[2]) if match[2] else None
                elif match[1] == "E":
                    if begun is not None:
                        done[begun[0] :] = self._address(node.token, done[begun[0] :], begun[1])
                    begun = None
                else:
                    self._own(done, node.token, match)
            _put(done, node.token, node.text[at:])
        return done

    def _address(self, token: Token, nodes: list[Node], number: int | None) -> list[Node]:
        _encode(nodes, "")
        if number is None or self._tracking is None:
            return nodes
        return [LinkNode(token, nodes, Destination(number, self._tracking))]

    def _own(self, done: list[Node], token: Token, match: re.Match[str]) -> None:
        """A followed link that is the same for everybody, or the pixel."""
        if self._tracking is None:
            return
        if match[1] == "L":
            _put(done, token, self._tracking.click_url)
            done.append(OutputNode(token, Path(token, [CLICK_TOKEN])))
            _put(done, token, self._tracking.link_part(int(match[2])))
        else:
            _put(done, token, PIXEL_BEFORE + self._tracking.open_url)
            done.append(OutputNode(token, Path(token, [OPEN_TOKEN])))
            _put(done, token, PIXEL_AFTER)


def _encode(nodes: list[Node], before: str) -> str:
    """Replace the values among the nodes of an address, blocks included; `before` is its text before them. Returns that behind them."""
    for at, node in enumerate(nodes):
        if isinstance(node, ContentNode):
            before += node.text
        elif type(node) in (OutputNode, EchoNode):
            filters = {str(part.name) for part in getattr(node.expression, "filters", None) or ()}  # type: ignore[attr-defined]
            if not filters & READY:
                part = "url" if _BEGINNING.fullmatch(before) else "part"
                nodes[at] = ValueNode(node, "link" if UNCODED in filters else part)  # type: ignore[arg-type]
        else:
            # One of the branches comes out: the one that says most tells what stands before what follows
            below = [_encode(block.nodes, before) for block in _blocks_of(node)]
            before = max([before, *below], key=len)
    return before


def _blocks_of(node: Node) -> Iterable[BlockNode]:
    for child in node.children(None, include_partials=False):  # type: ignore[arg-type]
        if isinstance(child, BlockNode):
            yield child
        else:
            yield from _blocks_of(child)


def _put(nodes: list[Node], token: Token, text: str) -> None:
    if text:
        nodes.append(ContentNode(token, text))

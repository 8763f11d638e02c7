"""The marks of `compose.link_rewriting` in a parsed template, replaced by what writes the links.

A followed link and the pixel become text and the recipient's token; the nodes of an address with merge tags become one node, whose text
is turned into the address that is sent. An address that begins in one block and ends in another is left as it stands.
"""

from collections.abc import Callable, Iterable
from typing import Any, TextIO

from liquid import RenderContext
from liquid.ast import BlockNode, Node
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import Path
from liquid.builtin.output import OutputNode
from liquid.token import Token

from compose.link_rewriting import CLICK_TOKEN, MARK, OPEN_TOKEN, Destination, Tracking

PIXEL_BEFORE = '<img src="'
PIXEL_AFTER = '" width="1" height="1" border="0" alt="" style="display:block;width:1px;height:1px">'


class LinkNode(Node):
    """An address with merge tags."""

    __slots__ = ("block", "destination")

    def __init__(self, token: Token, nodes: list[Node], destination: Callable[[str, dict[str, Any]], str]) -> None:
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

    def __init__(self, tracking: Tracking) -> None:
        self._tracking = tracking

    def __call__(self, nodes: list[Node]) -> list[Node]:
        """The nodes of one block."""
        done: list[Node] = []
        begun: tuple[int, int] | None = None  # where in `done` the address begins, and its link's number
        for node in nodes:
            if not isinstance(node, ContentNode) or "\0" not in node.text:
                done.append(node)
                continue
            at = 0
            for match in MARK.finditer(node.text):
                _put(done, node.token, node.text[at : match.start()])
                at = match.end()
                if match[1] == "B":
                    begun = len(done), int(match[2])
                elif match[1] == "E":
                    if begun is not None:
                        done[begun[0] :] = [LinkNode(node.token, done[begun[0] :], Destination(begun[1], self._tracking))]
                    begun = None
                elif match[1] == "L":
                    _put(done, node.token, self._tracking.click_url)
                    done.append(OutputNode(node.token, Path(node.token, [CLICK_TOKEN])))
                    _put(done, node.token, self._tracking.link_part(int(match[2])))
                else:
                    _put(done, node.token, PIXEL_BEFORE + self._tracking.open_url)
                    done.append(OutputNode(node.token, Path(node.token, [OPEN_TOKEN])))
                    _put(done, node.token, PIXEL_AFTER)
            _put(done, node.token, node.text[at:])
        return done


def _put(nodes: list[Node], token: Token, text: str) -> None:
    if text:
        nodes.append(ContentNode(token, text))

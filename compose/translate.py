"""Translates the parse tree of python-liquid into the operations of `ext.template`.

Each node and expression of a type known here becomes the operation that yields the same; every other one is handed over as
it is, to be rendered by python-liquid on the same scope, with its loops and blocks made to draw on the same budget.
"""

import functools
from collections.abc import Callable, Iterator
from io import StringIO
from typing import Any, Final, TextIO

from liquid import Environment, RenderContext, is_undefined
from liquid.ast import BlockNode, Node
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import BooleanExpression, FilteredExpression, LoopExpression, Path, logical, primitive
from liquid.builtin.expressions import filtered as filtered_expressions
from liquid.builtin.output import OutputNode
from liquid.builtin.tags.assign_tag import AssignNode
from liquid.builtin.tags.capture_tag import CaptureNode
from liquid.builtin.tags.case_tag import CaseNode, MultiExpressionBlockNode
from liquid.builtin.tags.comment_tag import CommentNode
from liquid.builtin.tags.doc_tag import DocNode
from liquid.builtin.tags.echo_tag import EchoNode
from liquid.builtin.tags.for_tag import BreakNode, ContinueNode, ForNode
from liquid.builtin.tags.if_tag import IfNode
from liquid.builtin.tags.inline_comment_tag import InlineCommentNode
from liquid.builtin.tags.liquid_tag import LiquidNode
from liquid.builtin.tags.tablerow_tag import TablerowNode
from liquid.builtin.tags.unless_tag import UnlessNode
from liquid.expression import Expression
from liquid.output import LimitedStringIO
from liquid.stringify import to_liquid_string
from liquid.template import BoundTemplate
from liquid.utils import ReadOnlyChainMap
from markupsafe import Markup

from compose import filters
from compose.link_nodes import LinkNode, ValueNode
from compose.link_rewriting import CLICK_TOKEN, OPEN_TOKEN
from compose.tags import ChoiceNode, TagExpression
from ext import template as ops
from ext.recipient import Names

# What `ext.template.Link` writes, by path
_LINKS: Final = {("links", "unsubscribe"): 0, ("links", "web_view"): 1, (CLICK_TOKEN,): 2, (OPEN_TOKEN,): 3}
_NO_FIELDS: Final = frozenset(("size", "first", "last"))  # behind a dot they mean something else


class Context(RenderContext):
    """python-liquid's context on the scope of a `Frame`, whose budget it draws on."""

    __slots__ = ("frame",)

    def __init__(self, template: BoundTemplate, **options: Any) -> None:
        super().__init__(template, **options)
        self.frame: ops.Frame | None = None

    def get(self, path: list[object], **options: Any) -> object:
        """As python-liquid's; counted."""
        if self.frame is not None:
            self.frame.charge(1)
        return super().get(path, **options)

    def assign(self, key: str, val: Any) -> None:
        """As python-liquid's, for values of bounded size."""
        self.locals[key] = ops.guard(val)

    def filter(self, name: str, token: Any) -> Callable[..., object]:
        """python-liquid's filter, with bounds on what goes in and comes out."""
        function = super().filter(name, token)

        def bounded(left: object, *arguments: object, **named: object) -> object:
            if self.frame is not None:
                self.frame.charge(1 + ops.effort(left) * ops.WEIGHTS.get(name, 1))
            ops.guard(left)
            for argument in (*arguments, *named.values()):
                ops.guard(argument)
            answer = function(left, *arguments, **named)
            if self.frame is not None:
                self.frame.charge(ops.effort(answer))
            return ops.guard(answer)

        return bounded

    def get_buffer(self, buf: TextIO | None = None) -> StringIO:
        """A buffer of bounded size that leaves line ends as they are, which python-liquid's bounded one does not."""
        carry = buf.size if isinstance(buf, LimitedStringIO) else 0
        return LimitedStringIO(limit=ops.OUTPUT_LIMIT - carry, newline="\n")

    def raise_for_loop_limit(self, length: int = 1) -> None:
        """Count the passes of a loop before they are made."""
        if self.frame is not None:
            self.frame.charge_loop(length)


class _Steps(Node):
    """Charges the operations of a block that python-liquid renders itself; writes nothing."""

    __slots__ = ("count",)

    def __init__(self, block: BlockNode) -> None:
        super().__init__(block.token)
        self.count = len(block.nodes)

    def render_to_output(self, context: RenderContext, buffer: Any) -> int:
        if isinstance(context, Context) and context.frame is not None:
            context.frame.charge(self.count)
        return 0


class _Bounded(Expression):
    """An expression whose value is looked at before a loop of python-liquid's runs over it."""

    __slots__ = ("inner",)

    def __init__(self, inner: Expression) -> None:
        super().__init__(inner.token)
        self.inner = inner

    def __str__(self) -> str:
        return str(self.inner)

    def evaluate(self, context: RenderContext) -> object:
        return ops.guard(self.inner.evaluate(context))

    def children(self) -> list[Expression]:
        return [self.inner]


def blocks(nodes: list[Node]) -> Iterator[BlockNode]:
    """Every block below `nodes`."""
    for node in nodes:
        if isinstance(node, BlockNode):
            yield node
            yield from blocks(node.nodes)
        else:
            yield from blocks(list(node.children(None, include_partials=False)))  # type: ignore[arg-type]


def _expressions(nodes: list[Node]) -> Iterator[Expression]:
    """Every expression below `nodes`, parts included."""

    def parts(expression: Expression) -> Iterator[Expression]:
        yield expression
        for part in expression.children():
            yield from parts(part)

    for node in nodes:
        for expression in node.expressions():
            yield from parts(expression)
        yield from _expressions(list(node.children(None, include_partials=False)))  # type: ignore[arg-type]


def _names_bound(nodes: list[Node]) -> set[str]:
    names = {"partial"}
    for node in nodes:
        names.update(str(name) for name in node.template_scope())
        names.update(str(name) for name in node.block_scope())
        names |= _names_bound(list(node.children(None, include_partials=False)))  # type: ignore[arg-type]
    return names


class Translator:
    """Translates the nodes of one template."""

    def __init__(self, env: Environment, template: BoundTemplate, constants: dict[str, object], names: Names | None) -> None:
        self.env = env
        self.names = names
        self.outputs: list[ops.Output] = []
        self.filters: list[ops.Filter] = []
        self.template = template
        self.constants = constants
        self.literals: list[str] = []
        self.only_text = True
        nodes = template.nodes
        self.bound = _names_bound(nodes)
        expressions = list(_expressions(nodes))
        paths = [part for part in expressions if isinstance(part, Path)]
        self.roots = {path.path[0] for path in paths if isinstance(path.path[0], str)}
        self.dynamic = any(not isinstance(path.path[0], str) for path in paths)
        self.keeps_position = any(
            isinstance(part, LoopExpression) and isinstance(part.offset, primitive.StringLiteral) and part.offset.value == "continue"
            for part in expressions
        )
        for part in expressions:
            for name in _filters_of(part):
                name.validate_filter_arguments(env)

    def make_context(
        self,
        frame: ops.Frame,
        scope: dict[str, object],
        local: dict[str, object],
        counters: dict[str, int],
        scopes: list[dict[str, object]],
        loops: list[object],
    ) -> Context:
        """A python-liquid context on the very objects of a frame, as `BoundTemplate.render` would have made it."""
        context = Context(self.template, globals=scope)
        context.locals = local
        context.counters = counters
        context.loops = loops  # type: ignore[assignment]
        context.scope = ReadOnlyChainMap(local, scope, *list(context.scope._maps)[2:-1], counters)
        context.scope.push({"partial": False})
        for namespace in scopes:
            context.scope.push(namespace)
        context.frame = frame
        return context

    # --- nodes
    def block(self, nodes: list[Node], *, muted: bool = False) -> ops.Block:
        """`muted`: python-liquid drops the text of blocks in which nothing but blanks could come out."""
        operations: list[ops.Operation] = []
        text: list[str] = []

        def flush() -> None:
            if joined := "".join(text):
                operations.append(ops.Literal(joined))
                self.literals.append(joined)
            text.clear()

        for node in nodes:
            known = self.constant_text(node)
            if known is not None:
                if not muted:
                    text.append(known)
                continue
            operation = self.node(node, muted)
            if operation is not None:
                self.only_text = False
                flush()
                operation.at = node.token.start_index
                operations.append(operation)
        flush()
        return ops.Block(operations)

    def inner(self, block: BlockNode, muted: bool) -> ops.Block:
        return self.block(block.nodes, muted=muted or block.blank)

    def constant_text(self, node: Node) -> str | None:
        """The text a node always yields, or None."""
        if isinstance(node, ContentNode):
            return node.text
        if type(node) in (OutputNode, ValueNode):
            found = self.constant(node.expression)  # type: ignore[attr-defined]
            if found is not None and not is_undefined(found[0]):
                return node.text(found[0]) if isinstance(node, ValueNode) else to_liquid_string(found[0], self.env.autoescape)
        return None

    def constant(self, part: Any) -> tuple[object] | None:
        """The value of an expression that is the same for everybody, or None. A tag that nobody knows is none: it is counted as empty."""
        if isinstance(part, FilteredExpression) and type(part) is FilteredExpression and not part.filters:
            part = part.left
        if isinstance(part, TagExpression):
            value = None if part.field or part.function else part.constant or part.fallback
            return (value,) if value else None
        if type(part) is Path and not part.children() and part.path[0] in self.constants.keys() - self.bound:
            return (RenderContext(self.template, globals=self.constants).get(list(part.path), token=None),)
        return None

    def node(self, node: Any, muted: bool) -> ops.Operation | None:
        kind = type(node)
        if kind in (OutputNode, EchoNode, ValueNode):
            return self.output(node)
        if kind in (IfNode, UnlessNode):
            pairs = [(node.condition, node.consequence), *((each.expression, each.block) for each in node.alternatives)]
            return ops.If(
                [self.expression(condition) for condition, _ in pairs],
                [self.inner(block, muted) for _, block in pairs],
                self.inner(node.default, muted) if node.default else None,
                kind is UnlessNode,
            )
        if kind is ForNode:
            return self.loop(node, muted)
        if kind is AssignNode:
            return ops.Assign(str(node.name), self.expression(node.expression))
        if kind is CaptureNode:
            return ops.Capture(str(node.name), self.inner(node.block, False), self.env.autoescape)
        if kind is ChoiceNode:
            return ops.Choice([self.inner(block, False) for block in node.blocks], node.seed.encode())
        if kind is LinkNode:
            to = node.destination
            return ops.Followed(self.inner(node.block, False), to, to.sealer, to.judge)
        if kind is LiquidNode:
            return self.inner(node.block, muted)
        if kind is CaseNode:
            return self.case(node, muted)
        if kind in (BreakNode, ContinueNode):
            return ops.Interrupt(kind is ContinueNode)
        if kind in (CommentNode, DocNode, InlineCommentNode):
            return None
        for block in blocks([node]):
            block.nodes.insert(0, _Steps(block))
        for part in [node, *_nodes([node])]:
            if isinstance(part, (TablerowNode, ForNode)) and not isinstance(part.expression.iterable, _Bounded):
                part.expression.iterable = _Bounded(part.expression.iterable)
        return ops.ForeignNode(node, muted)

    def output(self, node: OutputNode) -> ops.Operation:
        place = node.place if isinstance(node, ValueNode) else "html" if self.env.autoescape else ""
        part: Any = node.expression
        expression = self.expression(part)
        path = part.left if isinstance(part, FilteredExpression) and not part.filters else part
        if type(path) is Path and not path.children() and path.path[0] not in self.bound and place != "part":
            purpose = _LINKS.get(tuple(map(str, path.path)))
            if purpose is not None:
                return ops.Link(purpose, expression, "html" if self.env.autoescape else "")
        output = ops.Output(expression, place, str(part))
        self.outputs.append(output)
        return output

    def loop(self, node: ForNode, muted: bool) -> ops.Operation:
        expression = node.expression
        plain = expression.limit is None and expression.offset is None and not expression.reversed and not self.keeps_position
        watched = self.dynamic or "forloop" in self.roots
        return ops.For(
            str(expression.identifier),
            self.expression(expression.iterable),
            None if plain else expression,
            self.inner(node.block, muted),
            self.inner(node.default, muted) if node.default else None,
            f"{expression.identifier}-{expression.iterable}" if watched else None,
        )

    def case(self, node: CaseNode, muted: bool) -> ops.Operation:
        branches: list[tuple[list[ops.Expression] | None, ops.Block]] = []
        for block in node.blocks:
            if isinstance(block, MultiExpressionBlockNode):
                values = [self.expression(value) for value in block.expression.expressions]
                branches.append((values, self.inner(block.block, muted)))
            else:
                branches.append((None, self.inner(block, muted)))
        return ops.Case(self.expression(node.expression), branches, logical._eq)

    # --- expressions
    def expression(self, part: Any) -> ops.Expression:
        kind = type(part)
        if kind is FilteredExpression:
            left = self.expression(part.left)
            return ops.Filtered(left, [self.filter(each) for each in part.filters]) if part.filters else left
        if kind is Path:
            return self.path(part)
        if kind is primitive.StringLiteral:
            return ops.Constant(Markup(part.value) if self.env.autoescape else part.value)
        if kind in (primitive.TrueLiteral, primitive.FalseLiteral, primitive.IntegerLiteral, primitive.FloatLiteral):
            return ops.Constant(part.value)
        if kind is primitive.Nil:
            return ops.Constant(None)
        if kind is primitive.RangeLiteral:
            literals = all(type(end) is primitive.IntegerLiteral for end in (part.start, part.stop))
            if literals:
                return ops.Constant(part._make_range(part.start.value, part.stop.value))
            return ops.Range(self.expression(part.start), self.expression(part.stop), part._make_range)
        if kind in (primitive.Empty, primitive.Blank):
            return ops.Constant(part)
        if kind is BooleanExpression:
            return self.expression(part.expression)
        if kind in (logical.LogicalAndExpression, logical.LogicalOrExpression):
            return ops.Both(self.expression(part.left), self.expression(part.right), kind is logical.LogicalOrExpression)
        if kind in (logical.EqExpression, logical.NeExpression):
            negated = kind is logical.NeExpression
            return ops.Compare(self.expression(part.left), self.expression(part.right), logical._eq, equals=True, negated=negated)
        if kind in (logical.LtExpression, logical.GtExpression):
            low, high = (part.left, part.right) if kind is logical.LtExpression else (part.right, part.left)
            return ops.Compare(self.expression(low), self.expression(high), functools.partial(logical._lt, part.token))
        if kind in (logical.LeExpression, logical.GeExpression):
            low, high = (part.left, part.right) if kind is logical.LeExpression else (part.right, part.left)
            return ops.Compare(self.expression(low), self.expression(high), logical._le)
        if kind is logical.ContainsExpression:
            contains = functools.partial(logical._contains, part.token)
            return ops.Compare(self.expression(part.left), self.expression(part.right), contains)
        if kind is TagExpression:
            return self.tag(part)
        return ops.Foreign(part)

    def path(self, part: Path) -> ops.Expression:
        root = part.path[0]
        if not isinstance(root, str):
            return ops.Foreign(part)
        missing = self.env.undefined(root, token=part.token)
        found = self.constant(part)
        if found is not None:
            return ops.Constant(missing if is_undefined(found[0]) else found[0])
        keys = tuple(self.path(key) if isinstance(key, Path) else key for key in part.path[1:])
        direct = root not in self.bound
        slot = -1
        if self.names is not None and direct and root == "subscriber" and keys and type(keys[0]) is str and keys[0] not in _NO_FIELDS:
            slot = self.names.slot(keys[0])
        return ops.Path(root, keys, missing, direct, slot)

    def tag(self, part: TagExpression) -> ops.Expression:
        if part.function is not None:
            return ops.Function(part.function)
        if not part.field:
            return ops.Constant(part.constant or part.fallback)
        if part.own:
            slot = -1 if self.names is None else self.names.slot(part.field)
            own: ops.Expression = ops.Path("subscriber", (part.field,), "", True, slot)
        else:
            own = ops.Field(part.field, self.names.slot(part.field, loose=True) if self.names is not None else -1)
        if not part.fallback:
            return own
        default = ops.Filter("default", self.env.filters["default"], (ops.Constant(part.fallback),), {}, "", self.env.autoescape, None)
        return ops.Filtered(own, [default])

    def filter(self, part: Any) -> ops.Filter:
        function = self.env.filters[part.name]
        wants = "context" if getattr(function, "with_context", False) else ""
        may_keep: Callable[[str], object] = _always
        if function is filters.date:  # the same, without the cost of a python-liquid context
            function = functools.partial(filters.date_at, autoescape=self.env.autoescape)
            wants = "scope"
            may_keep = filters.ISO_DATE.fullmatch
        elif getattr(function, "with_environment", False):
            function = functools.partial(function, environment=self.env)
        positional = []
        named = {}
        for argument in part.args:
            value = self.expression(argument.value)
            name = getattr(argument, "name", None)
            if name:
                named[str(name)] = value
            else:
                positional.append(value)
        made = ops.Filter(str(part.name), function, tuple(positional), named, wants, self.env.autoescape, may_keep)
        self.filters.append(made)
        return made


def _always(_text: str) -> bool:
    """Every filter but `date` answers by its arguments alone."""
    return True


def _nodes(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        below = list(node.children(None, include_partials=False))  # type: ignore[arg-type]
        yield from below
        yield from _nodes(below)


def _filters_of(part: Expression) -> list[filtered_expressions.Filter]:
    return list(getattr(part, "filters", None) or ()) + list(getattr(part, "tail_filters", None) or ())

"""Liquid templates to segment programs: python-liquid parses, this file translates its parse tree for `ext.template`.

Whatever has no operation of its own is handed to python-liquid as it is and rendered there on the same scope, so the
language is python-liquid's, whole, but for file access (`include` and `render` are no tags here). The clock of a message
is its composition time: `now` and `today` are variables of the scope, and the `date` filter asks them.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, Final

from ext import template as ops
from liquid import Environment, RenderContext
from liquid.ast import BlockNode, Node
from liquid.builtin.content import ContentNode
from liquid.builtin.expressions import (
    BooleanExpression,
    FilteredExpression,
    LoopExpression,
    Path,
)
from liquid.builtin.expressions import filtered as filtered_expressions
from liquid.builtin.expressions import logical, primitive
from liquid.builtin.output import OutputNode
from liquid.builtin.tags.assign_tag import AssignNode
from liquid.builtin.tags.capture_tag import CaptureNode
from liquid.builtin.tags.case_tag import CaseNode, MultiExpressionBlockNode
from liquid.builtin.tags.echo_tag import EchoNode
from liquid.builtin.tags.for_tag import BreakNode, ContinueNode, ForNode
from liquid.builtin.tags.if_tag import IfNode
from liquid.builtin.tags.liquid_tag import LiquidNode
from liquid.builtin.tags.tablerow_tag import TablerowNode
from liquid.builtin.tags.unless_tag import UnlessNode
from liquid.exceptions import LiquidError
from liquid.expression import Expression
from liquid.stringify import to_liquid_string
from liquid.template import BoundTemplate
from liquid.utils import ReadOnlyChainMap
from markupsafe import Markup

from compose import filters
from domain.errors import Invalid

MAX_TEMPLATE_CHARACTERS: Final = 1_000_000
MAX_PENDING: Final = 64  # openings without an end behind the last end of their kind
MAX_BLANKS: Final = 1024  # blanks in a row right after an opening, as in BLANKS

# The lexer looks for the end of each opening up to the end of the text: many openings without one would cost the square.
OPENINGS: Final = (
    (re.compile(r"\{\{"), "}}"),
    (re.compile(r"\{%"), "%}"),
    (re.compile(r"\{%-?\s{0,99}raw\b"), "endraw"),
    (re.compile(r"\{%-?\s{0,99}doc\b"), "enddoc"),
)
BLANKS: Final = re.compile(r"(?:\{\{|\{%)-?\s{1024}")

Rewrite = Callable[[Environment, ContentNode], list[Node]]


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
                self.frame.charge(1)
            ops.guard(left)
            for argument in (*arguments, *named.values()):
                ops.guard(argument)
            return ops.guard(function(left, *arguments, **named))

        return bounded

    def raise_for_loop_limit(self, length: int = 1) -> None:
        """Count the passes of a loop before they are made."""
        if self.frame is not None:
            self.frame.charge_loop(length)


class _Template(BoundTemplate):
    context_class = Context


class _Environment(Environment):
    template_class = _Template
    output_stream_limit = ops.OUTPUT_LIMIT
    block_nesting_limit = 30


def environment(*, autoescape: bool) -> Environment:
    """The language of templates: python-liquid's standard tags and filters without file access."""
    env = _Environment(autoescape=autoescape)
    for tag in ("include", "render"):
        del env.tags[tag]
    filters.register(env)
    return env


HTML: Final = environment(autoescape=True)
TEXT: Final = environment(autoescape=False)


class _Steps(Node):
    """Charges the operations of a block that python-liquid renders itself; writes nothing."""

    __slots__ = ("count",)

    def __init__(self, block: BlockNode) -> None:
        super().__init__(block.token)
        self.count = len(block.nodes)

    def render_to_output(self, context: RenderContext, buffer: Any) -> int:  # noqa: ARG002
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


class Compiled:
    """One template: its program and what it asks for."""

    def __init__(self, program: ops.Program, literals: list[str], roots: set[str], dynamic: bool, constant: str | None) -> None:
        self.program = program
        self.literals = literals  # the texts that stand in the template itself
        self.roots = roots  # every variable name that is the first part of a path
        self.dynamic = dynamic  # a name is computed, so any variable may be asked for
        self.constant = constant  # the whole text, when it is the same for everybody

    def asks_for(self, root: str) -> bool:
        """Tell whether rendering may look at the variable `root`."""
        return self.dynamic or root in self.roots


def _position(source: str, at: int) -> str:
    line = source.count("\n", 0, at) + 1
    return f"line {line}, column {at - (source.rfind(chr(10), 0, at) + 1) + 1}"


def _refuse(field: str, source: str, error: Exception) -> Invalid:
    reason = Exception.__str__(error) or "it cannot be parsed"
    token = getattr(error, "token", None)
    if token is not None and token.start_index >= 0:
        return Invalid(field, f"{_position(source, token.start_index)}: {reason}")
    return Invalid(field, reason)


def _check_source(field: str, source: str) -> None:
    if len(source) > MAX_TEMPLATE_CHARACTERS:
        raise Invalid(field, f"it has {len(source)} characters, at most {MAX_TEMPLATE_CHARACTERS} are allowed")
    if (at := source.find("\0")) >= 0:
        raise Invalid(field, f"{_position(source, at)}: it holds a NUL")
    try:
        source.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Invalid(field, f"{_position(source, error.start)}: it holds half of a surrogate pair") from None
    for opening, end in OPENINGS:
        start = source.rfind(end) + 1
        pending = [match.start() for match in opening.finditer(source, start)]
        if len(pending) > MAX_PENDING:
            raise Invalid(field, f"{_position(source, pending[0])}: {source[pending[0]:pending[0] + 2]!r} is not closed by {end!r}")
    if match := BLANKS.search(source):
        raise Invalid(field, f"{_position(source, match.start())}: more than {MAX_BLANKS} blanks in a tag")


def _blocks(nodes: list[Node]) -> Iterator[BlockNode]:
    """Every block below `nodes`."""
    for node in nodes:
        if isinstance(node, BlockNode):
            yield node
            yield from _blocks(node.nodes)
        else:
            yield from _blocks(list(node.children(None, include_partials=False)))  # type: ignore[arg-type]


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


class _Compiler:
    """Translates the nodes of one template."""

    def __init__(self, env: Environment, template: BoundTemplate, constants: dict[str, object]) -> None:
        self.env = env
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
                operations.append(operation)
        flush()
        return ops.Block(operations)

    def inner(self, block: BlockNode, muted: bool) -> ops.Block:
        return self.block(block.nodes, muted=muted or block.blank)

    def constant_text(self, node: Node) -> str | None:
        """The text a node always yields, or None."""
        if isinstance(node, ContentNode):
            return node.text
        if type(node) is OutputNode and isinstance(node.expression, FilteredExpression) and not node.expression.filters:
            left = node.expression.left
            if isinstance(left, Path) and left.path[0] in self.constants and left.path[0] not in self.bound and not left.children():
                value = RenderContext(self.template, globals=self.constants).get(left.path, token=None)
                return to_liquid_string(value, self.env.autoescape)
        return None

    def node(self, node: Node, muted: bool) -> ops.Operation | None:
        kind = type(node)
        if kind in (OutputNode, EchoNode):
            return ops.Output(self.expression(node.expression), self.env.autoescape)
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
        if kind is LiquidNode:
            return self.inner(node.block, muted)
        if kind is CaseNode:
            return self.case(node, muted)
        if kind in (BreakNode, ContinueNode):
            return ops.Interrupt(kind is ContinueNode)
        if kind.__name__ in ("CommentNode", "DocNode", "InlineCommentNode"):
            return None
        for block in _blocks([node]):
            block.nodes.insert(0, _Steps(block))
        for part in [node, *_nodes([node])]:
            if isinstance(part, (TablerowNode, ForNode)) and not isinstance(part.expression.iterable, _Bounded):
                part.expression.iterable = _Bounded(part.expression.iterable)
        return ops.ForeignNode(node, muted)

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
    def expression(self, part: Expression) -> ops.Expression:
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
            sides = (part.left, part.right) if kind is logical.LtExpression else (part.right, part.left)
            return ops.Compare(*map(self.expression, sides), functools.partial(logical._lt, part.token))
        if kind in (logical.LeExpression, logical.GeExpression):
            sides = (part.left, part.right) if kind is logical.LeExpression else (part.right, part.left)
            return ops.Compare(*map(self.expression, sides), logical._le)
        if kind is logical.ContainsExpression:
            return ops.Compare(self.expression(part.left), self.expression(part.right), functools.partial(logical._contains, part.token))
        function = getattr(part, "function", None)
        if function is not None:  # a tag of `compose.tags`
            return ops.Function(function)
        return ops.Foreign(part)

    def path(self, part: Path) -> ops.Expression:
        root = part.path[0]
        if not isinstance(root, str):
            return ops.Foreign(part)
        keys = tuple(self.path(key) if isinstance(key, Path) else key for key in part.path[1:])
        missing = self.env.undefined(root, token=part.token)
        return ops.Path(root, keys, missing, root not in self.bound)

    def filter(self, part: Any) -> ops.Filter:
        function = self.env.filters[part.name]
        if getattr(function, "with_environment", False):
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
        with_context = getattr(self.env.filters[part.name], "with_context", False)
        return ops.Filter(str(part.name), function, tuple(positional), named, with_context, self.env.autoescape)


def _nodes(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        below = list(node.children(None, include_partials=False))  # type: ignore[arg-type]
        yield from below
        yield from _nodes(below)


def _filters_of(part: Expression) -> list[filtered_expressions.Filter]:
    return list(getattr(part, "filters", None) or ()) + list(getattr(part, "tail_filters", None) or ())


def _rewritten(nodes: list[Node], env: Environment, rewrite: Rewrite) -> list[Node]:
    return [new for node in nodes for new in (rewrite(env, node) if isinstance(node, ContentNode) else [node])]


def compile_template(
    field: str, source: str, env: Environment, constants: dict[str, object], rewrite: Rewrite | None = None
) -> Compiled:
    """Parse and translate `source`; raises Invalid naming `field`, line and column.

    `constants` are the variables that are the same for every recipient; `rewrite` may replace a node of literal text.
    """
    _check_source(field, source)
    try:
        template = env.from_string(source)
        if rewrite is not None:
            template.nodes = _rewritten(template.nodes, env, rewrite)
            for block in _blocks(template.nodes):
                block.nodes = _rewritten(block.nodes, env, rewrite)
        compiler = _Compiler(env, template, constants)
        block = compiler.block(template.nodes)
    except LiquidError as error:
        raise _refuse(field, source, error) from error
    except RecursionError as error:
        raise Invalid(field, "it is nested too deeply") from error
    constant = "".join(compiler.literals) if compiler.only_text else None
    return Compiled(ops.Program(block, compiler.make_context), compiler.literals, compiler.roots, compiler.dynamic, constant)

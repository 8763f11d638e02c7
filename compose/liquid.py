"""Liquid templates to segment programs: python-liquid parses, this file translates its parse tree for `ext.template`.

Whatever has no operation of its own is handed to python-liquid as it is and rendered there on the same scope, so the
language is python-liquid's, whole, but for file access (`include` and `render` are no tags here). The clock of a message
is its composition time: `now` and `today` are variables of the scope, and the `date` filter asks them.
"""

import re
from collections.abc import Callable
from typing import Final

from liquid import Environment
from liquid.ast import Node
from liquid.builtin.content import ContentNode
from liquid.exceptions import LiquidError
from liquid.stream import TokenStream
from liquid.template import BoundTemplate
from liquid.token import TOKEN_EXPRESSION, TOKEN_OUTPUT, TOKEN_TAG, Token

from compose import filters
from compose.translate import Context, Translator, blocks
from domain.errors import Invalid
from ext import template as ops
from ext.recipient import Names

MAX_TEMPLATE_CHARACTERS: Final = 1_000_000
MAX_PENDING: Final = 64  # openings without an end behind the last end of their kind
MAX_TAGS: Final = 20_000
MAX_TAG_CHARACTERS: Final = 20_000
MAX_PARENTHESES: Final = 100  # in one tag
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
Splice = Callable[[list[Node]], list[Node]]


class _Template(BoundTemplate):
    context_class = Context


class _Environment(Environment):
    at: Token | None = None  # the tag entered last: where an error is that knows no place of its own
    template_class = _Template
    block_nesting_limit = 30


def environment(*, autoescape: bool) -> _Environment:
    """The language of templates: python-liquid's standard tags and filters without file access."""
    env = _Environment(autoescape=autoescape)
    for name in ("include", "render"):
        del env.tags[name]
    for tag in env.tags.values():
        tag.get_node = _noting(env, tag.get_node)  # type: ignore[assignment, method-assign]
    filters.register(env)
    return env


def _noting(env: _Environment, get_node: Callable[[TokenStream], Node]) -> Callable[[TokenStream], Node]:
    def noting(stream: TokenStream) -> Node:
        env.at = stream.current
        return get_node(stream)

    return noting


HTML: Final = environment(autoescape=True)
TEXT: Final = environment(autoescape=False)


class Compiled:
    """One template: its program and what it asks for."""

    def __init__(self, program: ops.Program, translator: Translator, source: str) -> None:
        self.program = program
        self._source = source
        self.literals = translator.literals  # the texts that stand in the template itself
        self.roots = translator.roots  # every variable name that is the first part of a path
        self.dynamic = translator.dynamic  # a name is computed, so any variable may be asked for
        self.filters = translator.filters
        self.outputs = translator.outputs  # the places of values, which count how often they stay empty
        self.constant = "".join(translator.literals) if translator.only_text else None  # the whole text, when it is the same for everybody

    def place(self) -> str:
        """Where a rendering that failed stood, as "line 3, column 7: "; with marks in the source the line alone; "" where nobody knows."""
        at = self.program.at
        if at < 0:
            return ""
        place = _position(self._source, at)
        return f"{place.partition(',')[0] if chr(0) in self._source else place}: "

    def asks_for(self, root: str) -> bool:
        """Tell whether rendering may look at the variable `root`."""
        return self.dynamic or root in self.roots


def _position(source: str, at: int) -> str:
    line = source.count("\n", 0, at) + 1
    return f"line {line}, column {at - (source.rfind(chr(10), 0, at) + 1) + 1}"


def _refuse(field: str, source: str, error: LiquidError, at: Token | None) -> Invalid:
    reason = Exception.__str__(error) or "it cannot be parsed"
    token = at if error.token is None or error.token.start_index < 0 else error.token
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
            raise Invalid(field, f"{_position(source, pending[0])}: {source[pending[0] : pending[0] + 2]!r} is not closed by {end!r}")
    if match := BLANKS.search(source):
        raise Invalid(field, f"{_position(source, match.start())}: more than {MAX_BLANKS} blanks in a tag")


def _check_expressions(field: str, source: str, env: _Environment) -> None:
    """Refuse what python-liquid would read too slowly.

    Each tag costs microseconds, and within one it looks to the end from each opening parenthesis.
    """
    tags = 0
    for token in env.tokenizer()(source):
        if token.kind != TOKEN_EXPRESSION:
            tags += token.kind in (TOKEN_OUTPUT, TOKEN_TAG)
            if tags > MAX_TAGS:
                raise Invalid(field, f"{_position(source, token.start_index)}: there are more than {MAX_TAGS} tags")
            continue
        if len(token.value) > MAX_TAG_CHARACTERS:
            raise Invalid(field, f"{_position(source, token.start_index)}: a tag is longer than {MAX_TAG_CHARACTERS} characters")
        if token.value.count("(") > MAX_PARENTHESES:
            raise Invalid(field, f"{_position(source, token.start_index)}: a tag holds more than {MAX_PARENTHESES} parentheses")


def _rewritten(nodes: list[Node], env: Environment, rewrite: Rewrite) -> list[Node]:
    return [new for node in nodes for new in (rewrite(env, node) if isinstance(node, ContentNode) else [node])]


def compile_template(
    field: str,
    source: str,
    env: _Environment,
    constants: dict[str, object],
    rewrite: Rewrite | None = None,
    splice: Splice | None = None,
    names: Names | None = None,
) -> Compiled:
    """Parse and translate `source`; raises Invalid naming `field`, line and column.

    `constants` are the variables that are the same for every recipient; `rewrite` may replace a node of literal text, `splice` the
    nodes of a block. A source with the marks of `splice` in it was compiled without them before. `names` notes which fields of the
    subscriber are asked for: with it the program can be run on an `ext.recipient.Row`.
    """
    if splice is None:
        _check_source(field, source)
    env.at = None
    try:
        if splice is None:
            _check_expressions(field, source, env)
        template = env.from_string(source)
        if rewrite is not None:
            template.nodes = _rewritten(template.nodes, env, rewrite)
            for part in blocks(template.nodes):
                part.nodes = _rewritten(part.nodes, env, rewrite)
        if splice is not None:
            template.nodes = splice(template.nodes)
            for part in blocks(template.nodes):
                part.nodes = splice(part.nodes)
        translator = Translator(env, template, constants, names)
        block = translator.block(template.nodes)
        keeping = [each for each in translator.filters if each.keeps]
        for each in keeping:  # the memory of a template does not grow with its length
            each.room = min(ops.FILTER_MEMO_ENTRIES, ops.MEMO_ENTRIES // len(keeping))
    except LiquidError as error:
        raise _refuse(field, source, error, env.at) from error
    except RecursionError as error:
        raise Invalid(field, "it is nested too deeply") from error
    return Compiled(ops.Program(block, translator.make_context), translator, source)

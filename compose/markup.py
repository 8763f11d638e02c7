"""What is made of an HTML part when it is saved: MJML to HTML, style sheets into style attributes, a text part, a pre-header.

HTML parsers move and rename what they do not know, template tags among it. So each tag leaves before a parser sees the
markup, as a word or as a comment, whichever can stand at its place, and comes back afterwards; a tag that did not survive
is an error, never a silent loss. The libraries are imported where they are used: only saving needs them, and an engine starts sooner.
"""

import re
from html.parser import HTMLParser
from textwrap import dedent
from typing import Any, Final

from domain.errors import Invalid

PREHEADER: Final = (
    '<div style="display: none; max-height: 0px; overflow: hidden;">_PreHeaderText_</div>'
    '<div style="display: none; max-height: 0px; overflow: hidden;">' + "&nbsp;&zwnj;" * 60 + "</div>"
)  # the second one keeps the first words of the body out of the preview
PREHEADER_PLACE: Final = "_PreHeaderText_"

# Tags; what stands in `raw` and `comment` belongs to the block's tag
_TAGS: Final = re.compile(
    r"\{%-?\s*raw\s*-?%\}.*?\{%-?\s*endraw\s*-?%\}|\{%-?\s*comment\s*-?%\}.*?\{%-?\s*endcomment\s*-?%\}|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL
)
_AMP: Final = re.compile(r"\s*<!doctype html>\s*<html\b[^>]*(?:\u26a14email|amp4email)", re.IGNORECASE).match
# Where a comment cannot stand: in comments, in elements whose content is text, in tags
_NO_COMMENT: Final = re.compile(
    r"<!--.*?-->|<(style|script|title|textarea)\b.*?</\1\s*>|</?[a-z](?:[^<>\"']|\"[^\"]*\"|'[^']*')*>", re.DOTALL | re.IGNORECASE
)
_BODY: Final = re.compile(r"<body\b(?:[^<>\"']|\"[^\"]*\"|'[^']*')*>", re.IGNORECASE)
_PREFIX: Final = "zq"
_ROWS: Final = frozenset({"table", "tbody", "thead", "tfoot"})


class _Protected:
    """`markup` is the source with a word for each tag; `restore` puts the tags back."""

    def __init__(self, field: str, source: str) -> None:
        self._field = field
        self._tags: list[str] = []
        self._prefix = _PREFIX
        while self._prefix in source.lower():
            self._prefix += "q"
        self.words = re.compile(f"{self._prefix}(\\d+)z")
        self.markup = _TAGS.sub(self._word, source)

    def _word(self, match: re.Match[str]) -> str:
        self._tags.append(match[0])
        return f"{self._prefix}{len(self._tags) - 1}z"

    def with_comments(self) -> str:
        """The markup with comments for the words that stand between elements or in text."""
        pieces, end = [], 0
        for match in _NO_COMMENT.finditer(self.markup):
            pieces += [self.words.sub(r"<!--\g<0>-->", self.markup[end : match.start()]), match[0]]
            end = match.end()
        return "".join(pieces) + self.words.sub(r"<!--\g<0>-->", self.markup[end:])

    def blocks(self, made: str) -> list[str]:
        """The block tags ({% %}) of `made` in their order."""
        found = (self._tags[int(number)] for number in self.words.findall(made))
        return [tag for tag in found if tag.startswith("{%")]

    def restore(self, made: str, action: str) -> str:
        """Raises Invalid when a tag got lost, `action` names what was done."""
        word = self.words.pattern
        made = re.sub(f"<!--\\s*{word}\\s*-->", self.tag, made)
        made = re.sub(f'{word}(?:="")?', self.tag, made)
        missing = next((tag for tag in self._tags if tag not in made), None)
        if missing is not None:
            raise Invalid(self._field, f"{action} would lose a template tag; move it out of the markup around it", missing[:80])
        return made

    def tag(self, match: re.Match[str]) -> str:
        """What the word of `match` stands for."""
        return self._tags[int(match[1])]


def from_mjml(source: str) -> str:
    """The HTML of an MJML document. Raises Invalid with what the compiler says, or how to get it where it is not installed."""
    try:
        import mrml
    except ImportError:
        raise Invalid("mjml", "MJML is not installed on this machine; install Sluice with its extra, sluice[mjml], or send html") from None
    protected = _Protected("mjml", source)
    options = mrml.ParserOptions(include_loader=mrml.noop_loader())
    try:
        made: str = mrml.to_html(protected.markup, options).content
    except OSError as error:  # what it raises for every mistake in the source
        raise Invalid("mjml", f"is not valid MJML: {error}"[:300]) from None
    return protected.restore(made, "MJML")


def inline_css(html: str) -> str:
    """The style sheets of `<style>` as style attributes; the sheets stay for what cannot be an attribute (`@media`). Nothing is fetched."""
    import css_inline

    protected = _Protected("html", html)
    inliner = css_inline.CSSInliner(keep_style_tags=True, keep_link_tags=True, load_remote_stylesheets=False)
    try:
        made = inliner.inline(protected.with_comments())
    except css_inline.InlineError as error:
        raise Invalid("html", f"its style sheet cannot be inlined: {error}"[:300]) from None
    return protected.restore(made, "CSS inlining")


def text_of(html: str) -> str:
    """A text part with the words, tables and links of the HTML part, tags in their places. "" where it says nothing.

    Raises Invalid when template tags stand where they cannot be kept in order.
    """
    from inscriptis import get_text
    from inscriptis.model.config import ParserConfig

    protected = _Protected("text", html)
    made = get_text(_in_cells(protected.markup, protected.words), ParserConfig(display_links=True))
    kept = protected.blocks(made)
    if kept != protected.blocks(_SKIPPED.sub(_address, protected.markup)):
        raise Invalid("text", 'cannot be made from the HTML part: its template tags would change places. Give a text part, or "" for none')
    lines = [line.rstrip() for line in protected.words.sub(protected.tag, made).split("\n")]
    text = dedent(re.sub(r"\n{3,}", "\n\n", "\n".join(lines))).strip("\n")  # tables for layout indent
    return text + "\n" if text else ""


# What no text comes from: comments, sheets, the head, and tags but for the addresses of links
_SKIPPED: Final = re.compile(
    r"<!--.*?-->|<(style|script|head)\b.*?</\1\s*>|</?[a-z](?:[^<>\"']|\"[^\"]*\"|'[^']*')*>", re.DOTALL | re.IGNORECASE
)
_ADDRESS: Final = re.compile(r"<a\b.*?\shref\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s>]+)", re.DOTALL | re.IGNORECASE)


def _address(skipped: re.Match[str]) -> str:
    address = _ADDRESS.match(skipped[0])
    return address[1] if address else ""


class _Cells(HTMLParser):
    """Notes which words stand between rows or between cells: there a parser would move them out of the table."""

    def __init__(self, words: re.Pattern[str]) -> None:
        super().__init__(convert_charrefs=False)
        self.between: dict[str, str] = {}
        self._words = words
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in _ROWS or tag in ("tr", "td", "th", "caption"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        inner = self._open[-1] if self._open else ""
        frame = "<tr><td>{}</td></tr>" if inner in _ROWS else "<td>{}</td>" if inner == "tr" else ""
        if frame:
            for match in self._words.finditer(data):
                self.between[match[0]] = frame.format(match[0])


def _in_cells(markup: str, words: re.Pattern[str]) -> str:
    cells = _Cells(words)
    cells.feed(markup)
    cells.close()
    return words.sub(lambda match: cells.between.get(match[0], match[0]), markup)


def with_preheader(html: str, preheader: str, template: str = "") -> str:
    """The HTML part with `preheader` (a template) hidden behind `<body>`, where mail programs look for a preview (40).

    `template` is the HTML around it, empty for PREHEADER. Raises Invalid where it has no place for the text.
    """
    template = template or PREHEADER
    if not preheader.strip() or not html:
        return html
    if PREHEADER_PLACE not in template:
        raise Invalid("mail.preheader_template", f"must contain {PREHEADER_PLACE}, where the text goes", template[:80])
    block = template.replace(PREHEADER_PLACE, preheader)
    body = _BODY.search(html)
    at = body.end() if body else 0
    return html[:at] + block + html[at:]


def check_amp(amp: str, html: str) -> None:
    """Raises Invalid for an AMP part without an HTML part beside it, or one that does not say that it is AMP for mail."""
    if amp and not html:
        raise Invalid("amp", "needs an HTML part beside it, for mail programs that do not show AMP")
    if amp and not _AMP(amp):
        raise Invalid("amp", "must begin with <!doctype html><html \u26a14email> (or <html amp4email>)", amp.strip()[:80])

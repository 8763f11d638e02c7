"""Which links of an HTML part are followed, and where they lead: pure text work, once per campaign.

Links are found with the standard library's HTML parser on a copy in which template tags are blanked out, and nothing but the value of
an `href` is ever replaced: a library that writes HTML anew moves `{% for %}` out of tables. A link whose address is the same for all
recipients leads to `/c/<token><link part>` and is looked up by its number; one with merge tags carries its address, signed. Only http
and https can be followed; every other address is refused here (S4, bad input 55) or, like `mailto:`, left alone.
"""

import re
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from typing import Any, Final, NamedTuple
from urllib.parse import quote, quote_plus, urlsplit

import idna

from compose.tags import CHOICE, TAG
from domain import links
from domain.errors import Invalid
from ext.token import Sealer

NO_TRACK_CLASS: Final = "no-link-track"
LEFT_ALONE: Final = frozenset({"mailto", "tel", "sms", "geo", "cid", "webcal"})
MAX_LINKS: Final = 2000
MAX_ADDRESS_CHARACTERS: Final = 2000
MAX_OPEN_TAGS: Final = 1000  # "<" that no ">" follows: the parser looks to the end for each

# The names of the variables that hold the tokens; no template can name them, because they are no identifiers
CLICK_TOKEN: Final = "click token"
OPEN_TOKEN: Final = "open token"

# Marks in the source: NUL cannot stand in a template
LINK: Final = "\0L{}\0"  # a followed link, by number
BEGIN: Final = "\0B{}\0"  # an address with merge tags begins; 0: it is not followed, but gets its utm parameters
ADDRESS: Final = "\0A\0"  # an address begins that stays as it is, but for its values, which are encoded
END: Final = "\0E\0"
PIXEL: Final = "\0P\0"
MARK: Final = re.compile("\0([LBAEP])([0-9]*)\0")

_TEMPLATE_COMMENT = re.compile(r"\{%-?\s*(comment|doc)\b.*?\{%-?\s*end\1\s*-?%\}", re.DOTALL)
_OUTPUT = re.compile(r"\{\{.*?\}\}", re.DOTALL)
_TAG = re.compile(r"\{%.*?%\}", re.DOTALL)
_CONDITION = re.compile(r"<!--\[if[^\]>]{0,200}\]>(?:<!-->|-->)?|(?:<!--)?<!\[endif\]-->", re.IGNORECASE)  # Outlook's HTML is HTML, too
_ATTRIBUTE = re.compile(r"""([^\s"'>/=]+)(?:\s*=\s*("[^"]*"|'[^']*'|[^\s>"']+))?""")
_SYSTEM = re.compile(r"\{\{-?\s*links\s*[.\[]|%links?:", re.IGNORECASE)
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_ADDRESSES: Final = frozenset(("href", "src", "background", "action"))  # attributes that hold an address
_CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
# What `web_address` leaves as it is: nearly every address there is
_PLAIN = re.compile(r"https?://[a-z0-9._\-]+(?::[1-9][0-9]{0,3})?(?:[/?#][A-Za-z0-9!#$%&'()*+,/:;=?@\[\]~._\-]*)?")
_URL_CHARACTERS: Final = "!#$%&'()*+,/:;=?@[]~"


class Tracking(NamedTuple):
    """What a campaign wants, and the signed parts that are the same for everybody."""

    links: bool
    opens: bool
    utm_source: str
    utm_medium: str
    click_url: str  # https://<link domain>/c/
    open_url: str
    link_part: Callable[[int], str]  # link number -> domain.links.link_part
    destination_key: bytes
    carried: bool = False  # every followed link carries its own address: the contents of a message stream share their link numbers

    @property
    def wanted(self) -> bool:
        """Whether anything is to be rewritten at all."""
        return self.links or self.opens or bool(self.utm_source or self.utm_medium)


class Rewritten(NamedTuple):
    """The template with marks, and where link 1, 2, ... lead; "" for a link that carries its own address."""

    source: str
    destinations: tuple[str, ...]


def rewrite(field: str, source: str, tracking: Tracking) -> Rewritten:
    """Mark every link that is to change and the place of the pixel. Raises Invalid naming line and column of a refused address."""
    finder = _Finder(_blanked(source))
    finder.find(field, source)
    pieces: list[str] = []
    destinations: list[str] = []
    at = 0
    for start, end, what in sorted(finder.spans):
        written = source[start:end]
        new = None if what == _ADDRESS else _link(field, source, start, written, tracking, destinations, follow=what == _FOLLOWED)
        if new is None:
            new = _marked(written)
        else:
            quote_mark = written[0] if written[:1] in ("'", '"') else '"'
            new = quote_mark + new + quote_mark
        pieces += [source[at:start], new]
        at = end
    pieces.append(source[at:])
    marked = "".join(pieces)
    if tracking.opens:
        # Behind the last link nothing moved, so the place counts from the end
        place = len(marked) - (len(source) - finder.pixel)
        marked = marked[:place] + PIXEL + marked[place:] if at <= finder.pixel else marked + PIXEL
    return Rewritten(marked, tuple(destinations))


def _link(field: str, source: str, start: int, written: str, tracking: Tracking, destinations: list[str], *, follow: bool) -> str | None:
    """What stands for the address of a link, which is noted in `destinations` when it is followed; None: it stays."""
    address = written[1:-1] if written[:1] in ("'", '"') else written
    try:
        kind, url = _judge(address)
    except ValueError as refused:
        raise Invalid(field, f"{_position(source, start)}: the link {unescape(address)[:80]!r} {refused}") from None
    if kind == _LEAVE or not follow:
        return None
    if tracking.links and len(destinations) == MAX_LINKS:
        raise Invalid(field, f"{_position(source, start)}: there are more than {MAX_LINKS} links")
    marked = bool(tracking.utm_source or tracking.utm_medium)
    if kind == _SAME and not (tracking.links and tracking.carried):
        url = with_utm(url, tracking)
        if tracking.links:
            destinations.append(url)
            return LINK.format(len(destinations))
        return _attribute(url) if marked else None
    if tracking.links:
        destinations.append("")
    return BEGIN.format(len(destinations) if tracking.links else 0) + address + END if tracking.links or marked else None


def mark_addresses(source: str) -> str:
    """The template with a mark around every address that holds merge tags, and nothing else; as it is where it is no HTML."""
    finder = _Finder(_blanked(source))
    try:
        finder.find("", source)
    except Invalid:
        return source
    pieces: list[str] = []
    at = 0
    for start, end, _ in sorted(finder.spans):
        pieces += [source[at:start], _marked(source[start:end])]
        at = end
    return "".join([*pieces, source[at:]])


def _marked(written: str) -> str:
    """The value of an attribute, quotes included, marked as an address where it holds merge tags."""
    if _first_tag(written) < 0:
        return written
    quoted = written[:1] in ("'", '"')
    return f"{written[0]}{ADDRESS}{written[1:-1]}{END}{written[-1]}" if quoted else f"{ADDRESS}{written}{END}"


def _first_tag(address: str) -> int:
    return min((m.start() for m in (re.search(r"\{\{|\{%", address), TAG.search(address), CHOICE.search(address)) if m), default=-1)


def _position(source: str, at: int) -> str:
    return f"line {source.count(chr(10), 0, at) + 1}, column {at - source.rfind(chr(10), 0, at)}"


def _blanked(source: str) -> str:
    """The source with every character of a template tag replaced, so that places stay the same."""
    text = _TEMPLATE_COMMENT.sub(lambda m: " " * len(m[0]), source)
    text = _OUTPUT.sub(lambda m: "x" * len(m[0]), text)
    text = _TAG.sub(lambda m: " " * len(m[0]), text)
    return _CONDITION.sub(lambda m: " " * len(m[0]), text)


class _Finder(HTMLParser):
    """Spans of addresses (quotes included), and the place for the pixel: before the last `</body>`, else `</html>`, else the end."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self._text = text
        self._lines = [0, *(match.end() for match in re.finditer("\n", text))]
        self.spans: list[tuple[int, int, int]] = []
        self.pixel = len(text)
        self._ends: dict[str, int] = {}

    def find(self, field: str, source: str) -> None:
        """Read it all. Raises Invalid for what only an attack would write."""
        behind = self._text.rfind(">") + 1
        if self._text.count("<", behind) > MAX_OPEN_TAGS:
            raise Invalid(field, f"{_position(source, self._text.index('<', behind))}: this tag and those behind it are not closed")
        try:
            self.feed(self._text)
            self.close()
        except AssertionError:  # what the parser says to a broken declaration
            raise Invalid(field, f"{_position(source, self._offset())}: this is no HTML") from None
        self.pixel = self._ends.get("body", self._ends.get("html", len(self._text)))

    def _offset(self) -> int:
        line, column = self.getpos()
        return self._lines[line - 1] + column

    def handle_endtag(self, tag: str) -> None:
        """Remember the last one."""
        if tag in ("body", "html"):
            self._ends[tag] = self._offset()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note its addresses; the first `href` of what can be clicked is a link."""
        start = self._offset()
        text = self.get_starttag_text() or ""
        clicked = tag in ("a", "area") or tag.startswith("v:")
        link: tuple[int, int] | None = None
        tracked = True
        for match in _ATTRIBUTE.finditer(text, 1 + len(tag)):
            name = match[1].lower()
            if match[2] is None:
                continue
            if clicked and name == "href" and link is None:
                link = start + match.start(2), start + match.end(2)
            elif name in _ADDRESSES:
                self.spans.append((start + match.start(2), start + match.end(2), _ADDRESS))
            elif name == "class":
                tracked = tracked and NO_TRACK_CLASS not in match[2].strip("\"'").split()
        if link is not None:
            self.spans.append((*link, _FOLLOWED if tracked else _UNFOLLOWED))


_ADDRESS, _UNFOLLOWED, _FOLLOWED = range(3)
_LEAVE, _SAME, _PERSONAL = range(3)


def _judge(address: str) -> tuple[int, str]:
    """What to do with the address as it stands in the attribute. Raises ValueError saying why it is refused."""
    first = _first_tag(address)
    literal = unescape(address if first < 0 else address[:first]).strip(" \t\r\n\f")
    if _SYSTEM.search(address) or (first < 0 and not literal) or literal.startswith("#"):
        return _LEAVE, ""
    if _CONTROL.search(literal):
        raise ValueError("holds a line end or another control character")
    scheme = _SCHEME.match(literal)
    if scheme is not None and scheme[1].lower() in LEFT_ALONE:
        return _LEAVE, ""
    if scheme is None:
        if first >= 0 and not literal:
            return _PERSONAL, ""
        raise ValueError("leads nowhere in a message: write it whole, with https://")
    if scheme[1].lower() not in ("http", "https"):
        raise ValueError(f"cannot be followed: only http and https can (give it class={NO_TRACK_CLASS!r} to send it as it is)")
    return (_SAME, web_address(literal)) if first < 0 else (_PERSONAL, "")


def web_address(text: str) -> str:
    """An http or https address as it may stand in a Location header: ASCII, no blanks. Raises ValueError saying why it is refused."""
    if _CONTROL.search(text):
        raise ValueError("holds a line end or another control character")
    if "\\" in text:
        raise ValueError("holds a backslash")
    parts = urlsplit(text)
    if parts.scheme.lower() not in ("http", "https"):
        raise ValueError("is no http or https address")
    host = parts.hostname
    if not host:
        raise ValueError("names no host")
    if "@" in parts.netloc:
        raise ValueError("hides its host behind a user name")
    try:
        number = parts.port
    except ValueError:
        raise ValueError("has a port that is no number") from None
    if not host.isascii():
        try:
            host = idna.encode(host, uts46=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise ValueError("names a host that is no domain name") from None
    elif not re.fullmatch(r"[a-z0-9._\-]+|[0-9a-f:.]+", host):
        raise ValueError("names a host that is no domain name")
    if ":" in host:
        host = f"[{host}]"
    rest = text[text.index("://") + 3 + len(parts.netloc) :] if "://" in text else ""
    if "://" not in text:
        raise ValueError("names no host")
    url = f"{parts.scheme.lower()}://{host}{'' if number is None else f':{number}'}{quote(rest, safe=_URL_CHARACTERS)}"
    if len(url) > MAX_ADDRESS_CHARACTERS:
        raise ValueError(f"is longer than {MAX_ADDRESS_CHARACTERS} characters")
    return url


def with_utm(url: str, tracking: Tracking) -> str:
    """`url` with the campaign's utm parameters it does not have itself, before a fragment; nothing else of it changes (147)."""
    base, hash_mark, fragment = url.partition("#")
    path, question, query = base.partition("?")
    present = {part.partition("=")[0].lower() for part in query.replace(";", "&").split("&")}
    added = "&".join(
        f"{name}={quote_plus(value)}"
        for name, value in (("utm_source", tracking.utm_source), ("utm_medium", tracking.utm_medium))
        if value and name not in present
    )
    if not added:
        return url
    joint = "" if query.endswith("&") or (question and not query) else "&" if question else "?"
    return f"{path}{question}{query}{joint}{added}{hash_mark}{fragment}"


def _attribute(text: str) -> str:
    return escape(text, quote=True)


class Destination:
    """Turns the rendered address of a link with merge tags into the one that is sent; `scope` holds the recipient's token."""

    def __init__(self, number: int, tracking: Tracking) -> None:
        self._tracking = tracking
        self._part = tracking.link_part(number) if number else ""
        self._utm = bool(tracking.utm_source or tracking.utm_medium)

    @property
    def sealer(self) -> Sealer | None:
        """What writes the same links in octets; None where nothing is sealed."""
        if not self._part:
            return None
        wanted = self._tracking
        return Sealer(wanted.destination_key, wanted.click_url.encode("ascii"), self._part.encode("ascii"), not self._utm)

    def judge(self, text: str) -> str | None:
        """The address that `text`, as it stands in an attribute, means, with its utm parameters; None when it cannot be followed."""
        url = unescape(text) if "&" in text else text
        if not _PLAIN.fullmatch(url) or len(url) > MAX_ADDRESS_CHARACTERS:
            try:
                url = web_address(url.strip(" \t\r\n\f"))
            except ValueError:
                return None
        return with_utm(url, self._tracking) if self._utm else url

    def __call__(self, text: str, scope: dict[str, Any]) -> str:
        """`text` as it would stand in the attribute; an address that cannot be followed is left as it is."""
        url = self.judge(text)
        if url is None:
            return text
        if not self._part:
            return _attribute(url)
        token: str = scope[CLICK_TOKEN] + self._part
        return self._tracking.click_url + token + "/" + links.seal_destination(self._tracking.destination_key, token, url)

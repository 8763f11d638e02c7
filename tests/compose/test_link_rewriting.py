"""compose.link_rewriting: which links are followed, which are left alone, which are refused; nothing else of the HTML moves."""

import contextlib
import html
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose import link_rewriting
from compose.campaign import CompiledCampaign
from compose.link_rewriting import Tracking, rewrite, web_address, with_utm
from domain import links
from domain.errors import Invalid
from tests.compose.test_campaign import COMPOSED_AT, KEYRING, RECIPIENTS, assert_sound, campaign, one, parsed, recipient, said

BASE = "https://go.garden.example"


def tracking(*, follow: bool = True, opens: bool = False, source: str = "", medium: str = "") -> Tracking:
    return Tracking(follow, opens, source, medium, f"{BASE}/c/", f"{BASE}/o/", lambda number: f"<{number}>", b"k" * 32)


def marked(source: str, **wants: Any) -> str:
    return rewrite("html", source, tracking(**wants)).source.replace("\0", "|")


def html_of(compiled: CompiledCampaign, **fields: Any) -> str:
    _, _, wire, _ = one(compiled, recipient(**fields))
    assert_sound(wire)
    part = parsed(wire).get_body(("html",))
    assert part is not None
    return said(part).rstrip("\n")


def hrefs(text: str) -> list[str]:
    found: list[str] = []

    class Finder(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(value or "" for name, value in attrs if name == "href")

    Finder().feed(text)
    return found


def led_to(url: str, destinations: tuple[str, ...]) -> str:
    """Where a followed link leads, read as the web side does it."""
    token, _, own = url.removeprefix(f"{BASE}/c/").partition("/")
    read = links.read_click(KEYRING.derive("click"), KEYRING.derive("click-link"), token)
    assert read is not None
    assert read[0] == (3, 7, 1)
    if own:
        return links.read_destination(KEYRING.derive("click-destination"), token, own) or "refused"
    return destinations[read[1] - 1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('<a href="https://a.example/">x</a>', '<a href="|L1|">x</a>'),
        ("<A HREF='https://a.example/'>x</A>", "<A HREF='|L1|'>x</A>"),
        ("<a href=https://a.example/ id=1>x</a>", '<a href="|L1|" id=1>x</a>'),
        ('<a\n class="b"\n href = "https://a.example/"\n>x</a>', '<a\n class="b"\n href = "|L1|"\n>x</a>'),
        ('<area href="http://a.example">', '<area href="|L1|">'),
        ('<a title="a > b" href="https://a.example/">x</a>', '<a title="a > b" href="|L1|">x</a>'),
        ('<a title="href=\'no\'" href="https://a.example/">x</a>', '<a title="href=\'no\'" href="|L1|">x</a>'),
        ('<a data-href="/x" href="https://a.example/">x</a>', '<a data-href="/x" href="|L1|">x</a>'),
        ('<table>{% for x in y %}<tr><td><a href="https://a.example/">x</a></td></tr>{% endfor %}</table>',
         '<table>{% for x in y %}<tr><td><a href="|L1|">x</a></td></tr>{% endfor %}</table>'),
        ('{% if a > b %}<a {% if c %}class="d"{% endif %} href="https://a.example/">x</a>{% endif %}',
         '{% if a > b %}<a {% if c %}class="d"{% endif %} href="|L1|">x</a>{% endif %}'),
        ('<!--[if mso]><v:roundrect href="https://a.example/"><![endif]--><a href="https://b.example/">x</a>',
         '<!--[if mso]><v:roundrect href="|L1|"><![endif]--><a href="|L2|">x</a>'),
        ('<!--[if !mso]><!--><a href="https://a.example/">x</a><!--<![endif]-->',
         '<!--[if !mso]><!--><a href="|L1|">x</a><!--<![endif]-->'),
        ('<a href="https://a.example/?x={{ "a" | append: ">" }}">x</a>',
         '<a href="|B1|https://a.example/?x={{ "a" | append: ">" }}|E|">x</a>'),
        ('<a href="{{ subscriber.url }}">x</a>', '<a href="|B1|{{ subscriber.url }}|E|">x</a>'),
        ('<a href="https://a.example/%Subscriber:ID%">x</a>', '<a href="|B1|https://a.example/%Subscriber:ID%|E|">x</a>'),
    ],
)  # fmt: skip
def test_the_value_of_a_link_is_replaced_and_nothing_else(source: str, expected: str) -> None:
    assert marked(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '<a class="no-link-track" href="https://a.example/">x</a>',
        '<a class="x no-link-track y" href="https://a.example/">x</a>',
        '<a href="mailto:a@b.example?subject=x">x</a>',
        '<a href="MAILTO:a@b.example">x</a>',
        '<a href="tel:+4712345">x</a>',
        '<a href="#top">x</a>',
        '<a href="">x</a>',
        "<a name=x>x</a>",
        '<a href="{{ links.unsubscribe }}">x</a>',
        '<a href="{{links.web_view}}?x=1">x</a>',
        '<a href="%Link:Unsubscribe%">x</a>',
        '<link rel="stylesheet" href="https://a.example/x.css"><img src="https://a.example/x.png">',
        '<!-- <a href="https://a.example/">x</a> -->',
        '{% comment %}<a href="https://a.example/">x</a>{% endcomment %}',
        '<style>a[href="https://a.example/"] { }</style>',
        'no HTML: href="https://a.example/"',
    ],
)
def test_these_are_left_alone(source: str) -> None:
    marked, destinations = rewrite("html", source, tracking())
    assert (marked.replace("\0A\0", "").replace("\0E\0", ""), destinations) == (source, ())


@pytest.mark.parametrize(
    "address",
    [
        "javascript:alert(1)", "JaVaScRiPt:alert(1)", "java&#10;script:alert(1)", "data:text/html,x", "vbscript:x", "file:///etc/passwd",
        "//evil.example/", "\\\\evil.example\\", "/relative", "page.html", "https:evil.example", "https:///x", "http://", "https://a\\@b.example/",
        "https://bank.example@evil.example/", "https://bank.example:x@evil.example", "https://a.example/\r\nSet-Cookie: x",
        "https://a.example/&#13;&#10;Set-Cookie: x", "https://a.example:99999999/", "https://a.example:x/", "https://a b.example/",
        "https://a.example/" + "x" * 2001, "javascript:alert({{ subscriber.id }})", "/path/{{ subscriber.id }}",
        "javascript:%Subscriber:ID%", "ht{{ 'tps' }}://x.example",
    ],
)  # fmt: skip
def test_these_are_refused_when_the_campaign_is_saved(address: str) -> None:
    with pytest.raises(Invalid, match="line 2, column 9: the link"):
        rewrite("html", f'<p>\n<a href="{address}">x</a>', tracking())


def test_a_refused_link_may_be_sent_as_it_is() -> None:
    source = '<a class="no-link-track" href="shop://basket">x</a>'
    with pytest.raises(Invalid, match="no-link-track"):
        rewrite("html", '<a href="shop://basket">x</a>', tracking())
    assert "L1" not in marked(source.replace("shop:", "https:"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("HTTPS://A.Example/Path?Q=1#F", "https://a.example/Path?Q=1#F"),
        ("https://Zürich.example/straße?q=ü b", "https://xn--zrich-kva.example/stra%C3%9Fe?q=%C3%BC%20b"),
        ("https://a.example/%7Euser/%C3%9F?x=%2F", "https://a.example/%7Euser/%C3%9F?x=%2F"),
        ("http://127.0.0.1:8080/x", "http://127.0.0.1:8080/x"),
        ("http://[2001:db8::1]:80/x", "http://[2001:db8::1]:80/x"),
        ("https://a.example/a'b<c>\"d", "https://a.example/a'b%3Cc%3E%22d"),
    ],
)
def test_a_web_address_is_ascii_and_means_the_same(text: str, expected: str) -> None:
    assert web_address(text) == expected


@given(st.from_regex(link_rewriting._PLAIN, fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_the_short_way_for_plain_addresses_changes_nothing(text: str) -> None:
    assert web_address(text) == text


@given(st.text(max_size=60), st.booleans())
@settings(max_examples=400, deadline=None)
def test_whatever_is_written_a_web_address_is_one_or_refused(text: str, begun: bool) -> None:
    try:
        found = web_address("https://a.example/" + text if begun else text)
    except ValueError:
        return
    assert re.fullmatch(r"https?://[a-z0-9.\[\]:_-]+([/?#][!-~]*)?", found)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://a.example/", "https://a.example/?utm_source=News+%26+more&utm_medium=email"),
        ("https://a.example/x?", "https://a.example/x?utm_source=News+%26+more&utm_medium=email"),
        ("https://a.example/x?b=1;c=2&d=%20#part?x", "https://a.example/x?b=1;c=2&d=%20&utm_source=News+%26+more&utm_medium=email#part?x"),
        ("https://a.example/x?utm_source=own", "https://a.example/x?utm_source=own&utm_medium=email"),
        ("https://a.example/x?a&", "https://a.example/x?a&utm_source=News+%26+more&utm_medium=email"),
        ("https://a.example/?UTM_SOURCE=a&utm_medium=b#c", "https://a.example/?UTM_SOURCE=a&utm_medium=b#c"),
    ],
)
def test_utm_parameters_disturb_neither_query_nor_fragment(url: str, expected: str) -> None:
    assert with_utm(url, tracking(source="News & more", medium="email")) == expected


def test_utm_parameters_without_following() -> None:
    source = '<a href="https://a.example/?b=1&amp;c=2#d">x</a><a class="no-link-track" href="https://a.example/">y</a>'
    found = rewrite("html", source, tracking(follow=False, source="news"))
    assert found.destinations == ()
    assert found.source == source.replace("c=2#d", "c=2&amp;utm_source=news#d")
    compiled = campaign(html='<a href="https://a.example/{{ subscriber.city }}">x</a>', utm_source="news")
    assert hrefs(html_of(compiled, city="Kraków & co")) == ["https://a.example/Krak%C3%B3w%20%26%20co?utm_source=news"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("<body>x</body></html>", "<body>x|P|</body></html>"),
        ("<body>x<BODY></BODY >y</body>", "<body>x<BODY></BODY >y|P|</body>"),
        ("<html>x</html>", "<html>x|P|</html>"),
        ("x", "x|P|"),
        ("<body>x<!-- </body> --></body>", "<body>x<!-- </body> -->|P|</body>"),
        ('<body><a href="https://a.example/">x</a></body>', '<body><a href="|L1|">x</a>|P|</body>'),
        ('<body></body><a href="https://a.example/">x</a>', '<body></body><a href="|L1|">x</a>|P|'),
    ],
)
def test_the_pixel_stands_at_the_end_of_the_body(source: str, expected: str) -> None:
    assert marked(source, opens=True) == expected


def test_a_message_with_followed_links_leads_where_the_content_does() -> None:
    source = (
        '<html><body><a href="https://a.example/?x=1&amp;y=2">a</a>{% if subscriber.vip %}<a href="https://b.example/">b</a>{% endif %}'
        '<a href="https://c.example/{{ subscriber.first_name }}?n={{ subscriber.id }}&amp;m=1">c</a>{% for x in subscriber.urls %}'
        '<a href="{{ x }}">d</a>{% endfor %}<a href="{{ links.unsubscribe }}">u</a></body></html>'
    )
    compiled = campaign(html=source, track_links=True, track_opens=True)
    assert compiled.destinations == ("https://a.example/?x=1&y=2", "https://b.example/", "", "")
    text = html_of(compiled, first_name='A"<b>', vip=False, urls=["https://d.example/1?a=b&c=d", "javascript:alert(1)", "//e.example"])
    found = hrefs(text)
    assert [led_to(url, compiled.destinations) for url in found[:3]] == [
        "https://a.example/?x=1&y=2",
        "https://c.example/A%22%3Cb%3E?n=1001&m=1",
        "https://d.example/1?a=b&c=d",
    ]
    assert found[3:5] == ["javascript:alert(1)", "//e.example"], "not followed, so not made ours"
    assert found[5].startswith(f"{BASE}/u/")
    pixel = re.search(rf'<img src="{BASE}/o/([A-Za-z0-9_-]+)" [^<>]*></body></html>$', text)
    assert pixel is not None
    assert links.read(KEYRING.derive("open"), pixel[1]) == (3, 7, 1)
    assert compiled.destinations[1] not in text


def test_everything_but_the_links_is_as_without_tracking() -> None:
    plain, followed = campaign(), campaign(track_links=True, track_opens=True)
    for to in RECIPIENTS:
        texts = []
        for compiled in (plain, followed):
            part = parsed(one(compiled, to)[2]).get_body(("html",))
            assert part is not None
            texts.append(said(part))
        without = re.sub(rf'<img src="{BASE}/o/[^>]*>', "", texts[1])
        for was, now in zip(hrefs(texts[0]), hrefs(texts[1]), strict=True):
            without = without.replace(html.escape(now), html.escape(was), 1)
        assert html.unescape(without) == html.unescape(texts[0])


def test_links_inside_blocks_that_python_liquid_renders_itself() -> None:
    source = (
        '{% tablerow x in subscriber.rows cols: 1 %}<a href="https://a.example/">a</a><a href="https://b.example/{{ x }}">b</a>'
        '{% endtablerow %}{% capture c %}<a href="https://c.example/">c</a>{% endcapture %}{{ c }}{% raw %}<a href="https://d.example/">'
        "{{ d }}</a>{% endraw %}"
    )
    compiled = campaign(html=source, track_links=True)
    text = html_of(compiled, rows=[1, 2])
    assert [led_to(url, compiled.destinations) for url in hrefs(text)] == [
        "https://a.example/", "https://b.example/1", "https://a.example/", "https://b.example/2", "https://c.example/", "https://d.example/",
    ]  # fmt: skip
    assert "{{ d }}" in text


def test_an_address_that_crosses_a_block_is_sent_as_it_stands() -> None:
    source = '{% if true %}<a href="https://a.example/{% else %}<a href="https://b.example/{% endif %}x">c</a>'
    compiled = campaign(html=source, track_links=True)
    assert hrefs(html_of(compiled)) == ["https://a.example/x"]


def test_a_mistake_in_a_template_is_named_at_its_own_place() -> None:
    with pytest.raises(Invalid, match="line 2, column 11: unknown filter"):
        campaign(html='<a href="https://a.example/">x</a>\n<p>{{ x | nothing }}</p>', track_links=True)
    with pytest.raises(Invalid, match="line 1, column 3: it holds a NUL"):
        campaign(html="ab\0L1\0", track_links=True)


def test_the_same_message_again_has_the_same_octets() -> None:
    first, second = (campaign(track_links=True, track_opens=True) for _ in range(2))
    assert one(first, RECIPIENTS[0]) == one(second, RECIPIENTS[0])
    assert first.scope(RECIPIENTS[0], composed_at=COMPOSED_AT)[link_rewriting.CLICK_TOKEN]


HOSTILE = ["<a " * 200_000, "<!--" * 200_000, "<a href='" * 100_000, "<![" * 200_000, "</" * 300_000, '<a b="' * 100_000]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_html_is_read_or_refused_quickly(text: str) -> None:
    with pytest.raises(Invalid, match="not closed"):
        rewrite("html", text, tracking())
    with contextlib.suppress(Invalid):
        rewrite("html", text + ">", tracking())

"""Bad inputs 46 to 49: templates that reach for more than data or never end, and merge data that would break out of its place."""

import time
from typing import Any
from urllib.parse import quote

import pytest

from compose import liquid
from compose.rendering import render
from domain.errors import Invalid
from ext import template as ops
from tests.compose.test_campaign import MERGED, assert_sound, campaign, one, parsed, recipient, refusal, said
from tests.compose.test_link_rewriting import hrefs, led_to
from tests.compose.test_liquid import CONSTANTS, SCOPE


@pytest.mark.parametrize(
    ("template", "result"),
    [
        ("{{ ''.__class__ }}", None),
        ("{{ subscriber.__class__.__mro__[1].__subclasses__ }}", ""),
        ("{{ subscriber['__init__']['__globals__'] }}", ""),
        ("{{ 'x' | attr: '__class__' }}", None),
        ("{{ '{0.__class__}' }}|{{ '%(a)s' }}|{{ '{x!r}' | append: '' }}", "{0.__class__}|%(a)s|{x!r}"),
        ("{% include '/etc/passwd' %}", None),
        ("{% render '/etc/passwd' %}", None),
        ("{% extends 'x' %}", None),
        ("{% import 'os' %}", None),
        ("{{ subscriber | map: '__class__' | join }}", ""),
        ("{{ now.__class__ }}{{ today.resolution }}", ""),
    ],
)
def test_46_a_template_reaches_data_and_nothing_else(template: str, result: str | None) -> None:
    data = {"subscriber": {"first_name": "Ann"}}
    for html in (False, True):
        if result is None:
            with pytest.raises(Invalid, match="line 1, column"):
                render(template, data, html=html)
        else:
            assert render(template, data, html=html) == result


@pytest.mark.parametrize(
    "template",
    [
        "{% if x %}", "{{ x", "{% for i in x %}{{ i }}", "{% raw %}x", "{% comment %}x", "{% capture x %}", "{{" * 499_000,
        "{% raw %}" * 100_000,
        "{% case x %}{% when 1 %}", "{{ 'x }}", "{% if a %}" * 40 + "{% endif %}" * 40,
    ],
    ids=lambda template: template[:12],
)  # fmt: skip
def test_47_a_template_that_does_not_end_is_refused_with_its_place(template: str) -> None:
    started = time.process_time()
    with pytest.raises(Invalid) as refused:
        render("a\n" + template, {})
    assert refused.value.reason.startswith("line 2, column ")
    assert time.process_time() - started < 3


LONG = "<%d a b" * 40_000
ENDLESS = [
    "{% for i in (1..1000000000) %}{% endfor %}",
    "{% for i in (1..9999) %}{% for j in (1..9999) %}{% endfor %}{% endfor %}",
    "{% assign a = 'xxxxxxxx' %}" + "{% assign a = a | append: a %}" * 60,
    "{% for i in (1..9999) %}{{ subscriber.long | escape | size }}{% endfor %}",
    "{% for i in (1..9999) %}{{ subscriber.long | url_encode | size }}{% endfor %}",
    "{% for i in (1..9999) %}{% if subscriber.long contains 'zz' %}{% endif %}{% endfor %}",
    "{% for i in (1..9999) %}{% if subscriber.long == subscriber.long %}{% endif %}{% endfor %}",
    "{% for i in (1..9999) %}{{ subscriber.html | strip_html | size }}{% endfor %}",
    "{% for i in (1..9999) %}{{ subscriber.list | sort | size }}{% endfor %}",
    "{% for i in (1..9999) %}{{ subscriber.list | where: 'x', 1 | size }}{% endfor %}",
    "{% for i in (1..9999) %}{% if subscriber.list contains 'z' %}{% endif %}{% endfor %}",
    "{% for i in (1..9999) %}{{ i | append: ' march 2020' | date: '%Y' }}{% endfor %}",
    "{% for i in (1..9999) %}{{ subscriber.long }}{% endfor %}",
    "{% tablerow i in (1..9999) %}{{ subscriber.long | upcase | size }}{% endtablerow %}",
]


@pytest.mark.parametrize("template", ENDLESS, ids=lambda template: template[-60:])
def test_47_a_template_that_wants_too_much_stops_soon_and_says_where(template: str) -> None:
    fields = {"long": LONG, "html": "<b>x</b>" * 6000, "list": [f"{n * 7919 % 9901:05}" for n in range(9900)]}
    for html in (True, False):
        compiled = liquid.compile_template("html", "a\n " + template, liquid.HTML if html else liquid.TEXT, CONSTANTS)
        started = time.process_time()
        with pytest.raises(Exception, match=r"(?i)limit|more than|longer than|at most|too long|exceeds"):
            compiled.program.render({**SCOPE, "subscriber": fields})
        assert time.process_time() - started < 1, "some 50 ms on a machine that has nothing else to do"
        assert compiled.place().startswith("line 2, column ")


def test_47_one_recipient_is_refused_with_the_place_and_the_others_get_theirs() -> None:
    compiled = campaign(text="one\ntwo {% for i in (1..subscriber.n) %}{{ i }}{% endfor %}", html="")
    assert refusal(compiled, recipient(2, n=10**9)).reason.startswith("line 2, column 8: cannot be rendered: ")
    source = "<a href='https://a.example/{{ subscriber.x }}'>x</a>\n{{ 1 | divided_by: subscriber.n }}"
    tracked = campaign(html=source, track_links=True, text="")
    [answer] = tracked.build([recipient(2, n=0)], composed_at=1.7e9, attempt=1)
    assert isinstance(answer, Invalid)
    assert answer.reason.startswith("line 2: cannot be rendered: ")


@pytest.mark.parametrize("value", MERGED, ids=ascii)
def test_48_merge_data_that_would_break_a_header_is_refused_everywhere_one_can_stand(value: str) -> None:
    fields = {"subject": "x {{ subscriber.v }}", "from_name": "{{ subscriber.v }}", "headers": (("X-Note", "{{ subscriber.v }}"),)}
    for field, template in fields.items():
        content: dict[str, Any] = {"text": "hi", "html": "", field: template}
        assert refusal(campaign(**content), recipient(2, v=value)).reason.startswith("bad merge data: ")


NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</a><a href='https://evil.example/'>"]
NASTY += ["'", '"', "&quot;", "a b&c=d#e?f", "%zz"]


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("follow", [True, False])
def test_49_markup_in_a_name_stays_text_and_links_stay_whole(value: str, follow: bool) -> None:
    source = (
        '<p title="{{ subscriber.v }}">{{ subscriber.v }}</p>'
        '<a href="https://shop.example/{{ subscriber.v }}?q={{ subscriber.v }}&amp;r=%Subscriber:V%#{{ subscriber.v }}">'
        "{{ subscriber.v }}</a>"
        '<a class="no-link-track" href="https://shop.example/?q={{ subscriber.v | raw }}">x</a>'
    )
    compiled = campaign(html=source, text="", track_links=follow)
    wire = one(compiled, recipient(v=value))[2]
    assert_sound(wire)
    text = said(parsed(wire))
    assert text.count("<") == source.count("<"), "no tag more, none less"
    first, second = hrefs(text)
    coded = quote(value, safe="")
    address = led_to(first, compiled.destinations) if follow else first
    assert address == f"https://shop.example/{coded}?q={coded}&r={coded}#{coded}"
    assert second == f"https://shop.example/?q={value}"


def test_what_a_template_keeps_does_not_grow_with_its_length() -> None:
    compiled = liquid.compile_template("text", "{{ x | upcase }}{{ y | capitalize }}" * 2000, liquid.TEXT, {})
    rooms = [each.room for each in compiled.filters]
    assert len(rooms) == 4000
    assert sum(rooms) <= ops.MEMO_ENTRIES
    for number in range(20):
        assert compiled.program.render({"x": f"a{number}", "y": f"b{number}"}) == f"A{number}B{number}" * 2000

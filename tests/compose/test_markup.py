"""What is made of an HTML part when it is saved: template tags come through whole, in their places."""

import pytest

from compose import markup
from compose.rendering import render
from domain.errors import Invalid

LETTER = """<html><head><title>{{ subject }}</title>
<style>p { color: {{ brand }} } @media (max-width: 600px) { p { color: blue } }</style></head>
<body class="{{ look }}"><p>Dear {{ subscriber.name | default: "<friend>" }} &amp; family,</p>
<table>{% for item in items %}<tr>{% if item.image %}<td><img src="{{ item.image }}" alt="{{ item.name }}"></td>{% endif %}
<td><a href="{{ item.url }}?x=1&amp;y=2" {{ attributes }}>{{ item.name }}</a></td></tr>{% endfor %}</table>
<!--[if mso]>{{ outlook }}<![endif]--><ul>{% for each in list %}<li>{{ each }}</li>{% endfor %}</ul>
{% raw %}{{ not a tag }}{% endraw %}{% comment %}nobody reads this{% endcomment %}</body></html>"""
TAGS = ["{{ brand }}", "{{ look }}", '{{ subscriber.name | default: "<friend>" }}', "{% for item in items %}", "{% if item.image %}",
        "{% endif %}", "{{ item.url }}?x=1&amp;y=2", "{{ attributes }}", "{{ outlook }}",
        "{% raw %}{{ not a tag }}{% endraw %}"]  # fmt: skip


def test_css_goes_into_style_attributes_and_every_tag_stays():
    made = markup.inline_css(LETTER)
    assert '<p style="color: {{ brand }};">Dear {{ subscriber.name' in made
    assert "@media (max-width: 600px)" in made
    assert [tag for tag in TAGS if tag not in made] == []
    assert made.index("{% for item in items %}") < made.index("<tr>") < made.index("{% endfor %}") < made.index("</table>")


def test_inlined_html_renders_as_the_rows_it_had():
    data = {
        "items": [{"name": "Rope", "url": "https://a.example/r", "image": "r.png"}, {"name": "Lamp", "url": "https://a.example/l"}],
        "list": [],
    }
    made = render(markup.inline_css(LETTER), data, html=True)
    assert made.count("<tr>") == 2
    assert made.count("<img") == 1
    assert '<a href="https://a.example/l?x=1&amp;y=2"' in made


def test_the_text_part_has_words_tables_links_and_tags_in_their_order():
    text = markup.text_of(LETTER)
    assert "color" not in text
    assert "nobody reads" not in render(text, {})
    data = {"subscriber": {"name": "Ann"}, "list": ["one", "two"], "items": [{"name": "Rope", "url": "https://a.example/r"}]}
    said = render(text, data)
    assert said.startswith("Dear Ann & family,\n")
    assert "[Rope](https://a.example/r?x=1&y=2)" in said
    assert said.index("* one") < said.index("* two")
    assert said.rstrip().endswith("{{ not a tag }}")


def test_a_text_part_that_would_say_something_else_is_refused():
    with pytest.raises(Invalid, match="text: cannot be made"):
        markup.text_of('<p>a</p><a href="{{ a }}{% if x %}">{% if y %}b{% endif %}</a>{% endif %}')


@pytest.mark.parametrize("html", ["", "<p></p>", "<style>p {}</style>", "<img src='a.png'>"])
def test_markup_that_says_nothing_gives_no_text(html: str):
    assert markup.text_of(html) == ""


def test_mjml_becomes_html_with_its_tags():
    source = (
        '<mjml><mj-body><mj-section><mj-column><mj-text>Hello {{ subscriber.name | default: "you" }}</mj-text><mj-raw>{% if url %}</mj-raw>'
        '<mj-button href="{{ url }}">Go</mj-button><mj-raw>{% endif %}</mj-raw></mj-column></mj-section></mj-body></mjml>'
    )
    made = markup.from_mjml(source)
    assert 'href="{{ url }}"' in made
    assert made.index("{% if url %}") < made.index('href="{{ url }}"') < made.index("{% endif %}")
    assert "Hello you" in render(made, {}, html=True)


@pytest.mark.parametrize("source", ["<mjml><mj-body><x", "no markup", "<mjml><mj-body><mj-section>"])
def test_a_mistake_in_mjml_names_its_field(source: str):
    with pytest.raises(Invalid) as refused:
        markup.from_mjml(source)
    assert refused.value.field == "mjml"


def test_mjml_includes_read_no_files():
    with pytest.raises(Invalid):
        markup.from_mjml('<mjml><mj-body><mj-include path="/etc/passwd" /></mj-body></mjml>')


def test_the_preheader_stands_first_in_the_body_and_is_hidden():
    made = markup.with_preheader('<html><body bgcolor="a>b">\nHello</body></html>', "Only {{ days }} days")
    assert made.startswith(
        '<html><body bgcolor="a>b"><div style="display: none; max-height: 0px; overflow: hidden;">Only {{ days }} days</div>'
    )
    assert markup.with_preheader("<p>Hello</p>", "x").endswith("</div><p>Hello</p>")
    assert markup.with_preheader("<p>Hello</p>", " ") == "<p>Hello</p>"
    assert markup.with_preheader("<p>Hello</p>", "Hi", "<i>_PreHeaderText_</i>") == "<i>Hi</i><p>Hello</p>"
    with pytest.raises(Invalid, match="_PreHeaderText_"):
        markup.with_preheader("<p>Hello</p>", "Hi", "<i></i>")

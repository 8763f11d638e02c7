"""docs/templates.md: every example in it is true."""

import html
import json
import re
from pathlib import Path

import pytest

from compose import liquid, markup, mime
from compose.link_rewriting import with_utm
from compose.rendering import render
from compose.tags import KINDS
from ext import template as ops
from tests.compose.test_campaign import campaign
from tests.compose.test_link_rewriting import hrefs, html_of, led_to, tracking

TEXT = (Path(__file__).parents[2] / "docs" / "templates.md").read_text("utf-8")
EXAMPLES = re.findall(r"```(liquid|html-template)\n(.*?)\n```\n```json\n(.*?)\n```\n```text\n(.*?)\n```", TEXT, re.DOTALL)
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TEXT.splitlines() if line.startswith("| `")]


def test_no_example_is_left_out() -> None:
    assert len(EXAMPLES) == len(re.findall(r"```(?:liquid|html-template)\n", TEXT)) >= 8


@pytest.mark.parametrize(("kind", "template", "data", "result"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_renders_as_shown(kind: str, template: str, data: str, result: str) -> None:
    assert render(template, json.loads(data), html=kind == "html-template") == result


def test_the_command_in_the_text_answers_what_the_text_says() -> None:
    match = re.search(r"echo '(.*)' \| sluice template render", TEXT)
    assert match is not None
    wanted = json.loads(match[1])
    assert f'{{"result": "{render(wanted["template"], wanted["data"])}"}}' in TEXT


def test_links_lead_where_the_table_says() -> None:
    rows = [row for row in ROWS if row[0].startswith("`<a href")]
    assert len(rows) == 3
    for written, leads in rows:
        match = re.fullmatch(r"`(<a href=.*?>)`(?:, (\w+) \"(.*)\")?", written)
        assert match is not None
        compiled = campaign(html=match[1] + "x</a>", track_links=True)
        [url] = hrefs(html_of(compiled, **({match[2]: match[3]} if match[2] else {})))
        assert led_to(html.unescape(url), compiled.destinations) == leads.strip("`")


def test_utm_parameters_are_added_as_the_table_says() -> None:
    rows = [row for row in ROWS if row[0].startswith("`https://")]
    assert len(rows) == 3
    for link, becomes in rows:
        assert with_utm(link.strip("`"), tracking(source="news", medium="email")) == becomes.strip("`")


def test_a_text_part_is_made_as_the_table_says() -> None:
    rows = [row for row in ROWS if row[0].startswith("`<p>")]
    assert len(rows) == 2
    for html_part, made in rows:
        assert markup.text_of(html_part.strip("`")).strip() == made.strip("`")


def test_the_parts_of_a_message_are_what_the_text_says() -> None:
    parts = TEXT.partition("## Parts of a message")[2].partition("## Limits")[0]
    assert f"At most {mime.MAX_ATTACHMENTS} files" in parts
    assert markup.PREHEADER_PLACE in parts
    markup.check_amp("<!doctype html><html ⚡4email>", "<p>")
    markup.check_amp("<!doctype html><html amp4email>", "<p>")
    assert mime.coding("Привет, мир") == "base64"
    assert mime.coding("Viele Grüße aus dem Süden, und bis bald") == "quoted-printable"
    assert mime.coding_8bit("Привет, мир") == "8bit"
    assert "eightbitmime=true" in parts
    assert "longer than 998 octets" in parts


def test_the_limits_are_those_that_the_text_names() -> None:
    limits = TEXT.partition("## Limits")[2].replace("\n", " ")
    saved = (liquid.MAX_TEMPLATE_CHARACTERS, liquid.MAX_TAGS, liquid.MAX_TAG_CHARACTERS, liquid.TEXT.block_nesting_limit)
    rendered = (ops.STEP_LIMIT, ops.LOOP_LIMIT, ops.VALUE_LIMIT, ops.OUTPUT_LIMIT, 1 << 5)
    for limit in (*saved, *rendered):
        assert f"{limit:,}" in limits


def test_every_percent_tag_of_the_table_has_a_value() -> None:
    tags = re.findall(r"%\w+:\w+%", " ".join(row[0] for row in ROWS if row[0].startswith("`%")))
    assert len(tags) >= 18
    for tag in tags:
        data: dict[str, dict[str, object]] = {kind: {"id": 7, "name": "N"} for kind in (*KINDS, "subscriber")}
        data["subscriber"] |= {"email": "a@b.example", "subscription_ip": "192.0.2.7", "subscription_date": "2024-02-29"}
        data["user"]["email"] = "u@b.example"
        assert render(tag, data) not in ("", tag)

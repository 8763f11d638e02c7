"""compose.tags: merge tags with percent signs mean what they meant (requirements 48-64), and other percent signs are text."""

from typing import Any

import pytest

from compose.rendering import render
from domain.errors import Invalid
from tests.compose.test_campaign import campaign, one, parsed, recipient, refusal, said


def text_of(template: str, **fields: Any) -> str:
    return said(parsed(one(campaign(text=template, html="", subject="s"), recipient(5, **fields))[2])).removesuffix("\n")


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("%User:ID%", "3"),
        ("%User:UserID%", "3"),
        ("%User:EmailAddress%", ""),
        ("%UserGroup:ID%", ""),
        ("%UserGroup:HashedUserGroupID%", ""),
        ("%Campaign:ID%", "7"),
        ("%Campaign:CampaignID%", "7"),
        ("%Campaign:CampaignName%", "Spring & sea"),
        ("%List:ID%", "5"),
        ("%List:ListID%", "5"),
        ("%Subscriber:ID%", "1005"),
        ("%Subscriber:SubscriberID%", "1005"),
        ("%Subscriber:EmailAddress%", "ann@shore.example"),
        ("%Subscriber:FirstName%", "Ann"),
        ("%subscriber:first_name%", "Ann"),
        ("%SUBSCRIBER:FIRSTNAME%", "Ann"),
        ("%Subscriber:LastName%", ""),
        ("%Subscriber:Nothing%", ""),
        ("%Subscriber:SubscriptionIP%", ""),
        ("%Subscriber:SubscriptionDate%", "2024-01-02"),
        ("%UserGroup:UserGroupID%", ""),
        ("%User:Password%", ""),
        ("%Weather:Today%", ""),
        ("%sender_domain%", "garden.example"),
        ("%Sender_Domain%", "garden.example"),
    ],
)
def test_a_tag_yields_its_value_or_nothing(tag, value):
    fields = {"first_name": "Ann", "Subscription_Date": "2024-01-02", "nothing": None}
    assert text_of(f"[{tag}|{tag}]", **fields) == f"[{value}|{value}]"


def test_who_sends_and_who_signed_up_when_is_told_from_the_snapshot() -> None:
    template = "%User:EmailAddress% {{ user.email }} %UserGroup:ID% %UserGroup:UserGroupID% {{ user_group.id }} "
    template += "%Subscriber:SubscriptionIP% %Subscriber:SubscriptionDate%"
    compiled = campaign(text=template, html="", subject="s", user_email="ada@corp.example", user_group_id=12)
    data = {"subscription_ip": "192.0.2.7", "subscription_date": "2024-02-29"}
    assert said(parsed(one(compiled, recipient(5, **data))[2])) == "ada@corp.example ada@corp.example 12 12 12 192.0.2.7 2024-02-29\n"
    groups = {said(parsed(one(campaign(text="%UserGroup:HashedUserGroupID%", html="", subject="s", user_group_id=group), recipient())[2]))
              for group in (0, 1, 2)}  # fmt: skip
    assert "\n" in groups
    assert len(groups) == 3


@pytest.mark.parametrize("kind", ["User:HashedUserID", "Campaign:HashedCampaignID", "List:HashedListID", "Subscriber:HashedSubscriberID"])
def test_a_hashed_id_is_short_and_always_the_same(kind):
    first = text_of(f"%{kind}%")
    assert len(first) == 16
    assert set(first) <= set("0123456789abcdef")
    assert text_of(f"%{kind}%") == first


def test_hashed_ids_differ_between_kinds_and_recipients():
    compiled = campaign(text="%Subscriber:HashedSubscriberID%", html="", subject="s")
    assert len({said(parsed(one(compiled, recipient(number))[2])) for number in range(20)}) == 20


@pytest.mark.parametrize(
    "text",
    [
        'width="100%"',
        "https://a.example/%20b%3Ac%E2%80%A6",
        "100% sure: 50% of it",
        "% Subscriber:X %",
        "%:x%",
        "%a%",
        "%AB:cd%20",
        "50%:x%",
        "%Subscriber%",
        "%%",
        "a%b:c%d",
    ],
)
def test_other_percent_signs_are_text(text):
    assert text_of(text) == text


def test_a_value_is_escaped_in_html_and_checked_in_the_subject():
    compiled = campaign(html="<b>%Subscriber:Nick%</b>", text="%Subscriber:Nick%", subject="Hi %Subscriber:Nick%")
    message = parsed(one(compiled, recipient(2, nick="<&>"))[2])
    assert message["subject"] == "Hi <&>"
    assert said(message.get_body(("html",))) == "<b>&lt;&amp;&gt;</b>"
    assert said(message.get_body(("plain",))) == "<&>"
    assert refusal(compiled, recipient(2, nick="a\r\nb")).field == "subject"


def test_tags_work_inside_and_beside_the_tags_of_liquid():
    template = "{% if true %}%Subscriber:City%{% endif %}{% capture x %}(%Subscriber:City%){% endcapture %}{{ x }}{{ x }}"
    template += "{% tablerow i in (1..2) cols:2 %}%Campaign:ID%{% endtablerow %}{% ifchanged %}%sender_domain%{% endifchanged %}"
    out = text_of(template, city="Ürb")
    assert out.startswith("Ürb(Ürb)(Ürb)")
    assert '<td class="col1">7</td><td class="col2">7</td>' in out
    assert out.endswith("garden.example")


def test_a_field_is_found_for_each_recipient_anew():
    compiled = campaign(text="[%Subscriber:FirstName%]", html="", subject="s")
    rows: list[dict[str, Any]] = [{"first_name": "a"}, {"FirstName": "b"}, {}, {"FIRST_NAME": "c", "x": 1}, {"first_name": "d"}]
    assert [said(parsed(one(compiled, recipient(2, **row))[2])) for row in rows] == ["[a]\n", "[b]\n", "[]\n", "[c]\n", "[d]\n"]


def test_a_tag_in_the_subject_of_the_campaign_is_checked_when_it_is_saved():
    with pytest.raises(Invalid, match="subject"):
        campaign(subject="%Subscriber:Nick%\nx")


def test_values_that_came_out_empty_are_counted() -> None:
    source = "{{ subscriber.city }}%Subscriber:Nick%{{ subscriber.x | upcase }}{{ subscriber.y | default: 'd' }}"
    compiled = campaign(text=source + "%Weather:Today%{{ nothing.at.all }}", html="", subject="s")
    assert compiled.empty_values() == {}
    people = [recipient(1, city="Lyon", nick="L"), recipient(2, city=""), recipient(3, city=None, x="")]
    compiled.build(people, composed_at=1.7e9, attempt=1)
    assert compiled.empty_values() == {
        "subscriber.city": 2, "%Subscriber:Nick%": 2, "subscriber.x | upcase": 3, "%Weather:Today%": 3, "nothing.at.all": 3,
    }  # fmt: skip


def test_a_fallback_stands_in_for_no_value() -> None:
    template = "%Subscriber:FirstName|dear reader%, %Subscriber:Nothing|you & <me>%|"
    assert render("%Subscriber:FirstName|dear reader%!", {"subscriber": {"first_name": ""}}) == "dear reader!"
    assert render(template.replace("<me>", "me"), {"subscriber": {"first_name": "A&B"}}, html=True) == "A&amp;B, you & me|"


def test_a_choice_is_the_same_for_a_recipient_and_spread_over_a_list() -> None:
    template = "[[Hello %Subscriber:Name|you%|Hi|<b>Moin</b>]], [[a|b]]"
    texts = [render(template, {"subscriber": {"id": number, "name": "<X>"}}, html=True) for number in range(300)]
    assert texts == [render(template, {"subscriber": {"id": number, "name": "<X>"}}, html=True) for number in range(300)]
    greetings = {text.rpartition(", ")[0]: 0 for text in texts}
    assert greetings.keys() == {"Hello &lt;X&gt;", "Hi", "<b>Moin</b>"}
    for greeting in greetings:
        assert 60 < sum(text.startswith(greeting) for text in texts) < 140
    other = [render(template, {"subscriber": {"id": number, "name": "<X>"}, "campaign": {"id": 8}}, html=True) for number in range(300)]
    assert other != texts


def test_brackets_that_are_no_choice_are_text() -> None:
    for text in ("[[a]]", "[a|b]", "[[a|b]", "x[[", "if (a[[1][0]] || b) {"):
        assert render(text, {}) == text


def test_links_inside_a_choice_are_followed() -> None:
    source = (
        '[[<a href="https://a.example/">x</a>|<a href="https://b.example/%Subscriber:ID%">y</a>]]<a href="https://c.example/[[1|2]]">z</a>'
    )
    compiled = campaign(html=source, track_links=True)
    assert compiled.destinations == ("https://a.example/", "", "")
    seen = set()
    for number in range(1, 13):
        part = parsed(one(compiled, recipient(number))[2]).get_body(("html",))
        assert part is not None
        text = part.get_content()
        assert text.count("https://go.garden.example/c/") == 2
        assert "[[" not in text
        seen.add(">x<" in text)
    assert seen == {True, False}

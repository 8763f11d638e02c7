"""compose.campaign: whole messages that parse back, say what python-liquid says, and can never be broken by merge data."""

import email
import email.policy
import re
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compose.campaign import CompiledCampaign, Message, check
from config.keys import Keyring
from domain import links, return_path
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid
from tests.reference import header_fields, liquid_alone
from tests.reference.quoted_printable import normalised

DATA = Path(__file__).parents[1] / "data"
KEYRING = Keyring(b"a key that has thirty-two octets")
COMPOSED_AT = 1_772_600_767.25
PUBLIC_URL = "http://127.0.0.1:8080"

CONTENT = CampaignContent(
    id=7,
    version=2,
    user_id=3,
    list_id=5,
    name="Spring & sea",
    subject="{{ subscriber.first_name | default: 'Reader' }}, news from {{ subscriber.city }}",
    from_name="Gärten & Co",
    from_email="letter@garden.example",
    reply_to="answers@garden.example",
    html=(DATA / "newsletter.html").read_text("utf-8"),
    text=(DATA / "newsletter.txt").read_text("utf-8"),
    list_name="Garden friends",
    list_sender_email="lists@garden.example",
    list_sender_name="Garden Lists",
    delivery_server_id=1,
    queued_at=COMPOSED_AT,
)
SERVER = DeliveryServer(id=1, user_id=3, name="relay", host="relay.example", mfrom="bounce.garden.example", link_domain="go.garden.example")


def recipient(number: int = 1, email: str = "ann@shore.example", **fields: Any) -> Recipient:
    return Recipient(number, 1000 + number, email, msgspec.Raw(msgspec.json.encode(fields)))


RECIPIENTS = [
    recipient(number, **msgspec.json.decode(line)) for number, line in enumerate((DATA / "recipients.ndjson").read_bytes().splitlines(), 1)
]


def campaign(server: DeliveryServer = SERVER, public_url: str = PUBLIC_URL, **changes: Any) -> CompiledCampaign:
    return CompiledCampaign(msgspec.structs.replace(CONTENT, **changes), server, KEYRING, public_url)


def one(compiled: CompiledCampaign, to: Recipient) -> Message:
    [answer] = compiled.build([to], composed_at=COMPOSED_AT, attempt=1)
    assert not isinstance(answer, Invalid), answer
    return answer


def refusal(compiled: CompiledCampaign, to: Recipient) -> Invalid:
    before, answer, after = compiled.build([recipient(1), to, recipient(3)], composed_at=COMPOSED_AT, attempt=1)
    assert isinstance(answer, Invalid)
    assert not isinstance(before, Invalid), "one recipient's data is nobody else's trouble"
    assert not isinstance(after, Invalid)
    return answer


def parsed(wire: bytes) -> EmailMessage:
    message = email.message_from_bytes(wire, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    assert not message.defects
    return message


def said(part: Any) -> str:
    """The text of a part, line ends as LF. What is quoted-printable ends with one more, which the boundary or the end needs."""
    text = normalised(part.get_content())
    return text + "\n" if part["Content-Transfer-Encoding"] == "base64" else text


def assert_sound(wire: bytes) -> None:
    """S1: CR LF only, no NUL, no line over 998, no line that starts with a dot; header lines folded."""
    assert wire.endswith(b"\r\n")
    assert b"\0" not in wire
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)", wire)
    head, _, body = wire.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n"):
        assert len(line) <= 78 or b"<" in line or b"@" in line
    for line in wire.split(b"\r\n"):
        assert len(line) <= 998
        assert not line.startswith(b".")
    for line in body.split(b"\r\n"):
        assert len(line) <= 76
        assert not line.endswith((b" ", b"\t"))


@pytest.mark.parametrize("to", RECIPIENTS, ids=lambda to: to.email)
def test_a_message_says_in_both_parts_what_python_liquid_says_alone(to):
    compiled = campaign(subject="News", from_name="Gärten")
    _, _, wire, _ = one(compiled, to)
    assert_sound(wire)
    message = parsed(wire)
    scope = compiled.scope(to, composed_at=COMPOSED_AT)
    for kind, source, html in (("plain", CONTENT.text, False), ("html", CONTENT.html, True)):
        part = message.get_body((kind,))
        assert part is not None
        assert said(part) == normalised(liquid_alone.render(source, scope, html=html))
        assert part["content-type"].params["charset"] == "utf-8"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]


def test_the_headers_of_a_message():
    compiled = campaign()
    mail_from, rcpt, wire, smtputf8 = one(compiled, RECIPIENTS[0])
    message = parsed(wire)
    unsubscribe = compiled.scope(RECIPIENTS[0], composed_at=COMPOSED_AT)["links"]["unsubscribe"]
    assert rcpt == b"ann@shore.example"
    assert smtputf8 is False
    assert message["date"] == "Wed, 04 Mar 2026 05:06:07 +0000"
    assert message["from"].addresses[0].display_name == "Gärten & Co"
    assert message["from"].addresses[0].addr_spec == "letter@garden.example"
    assert message["to"] == "ann@shore.example"
    assert message["reply-to"] == "answers@garden.example"
    assert message["subject"] == "Ann, news from Zürich"
    assert message["mime-version"] == "1.0"
    assert message["list-unsubscribe-post"] == "List-Unsubscribe=One-Click"
    assert message["list-id"] == "Garden friends <list-5.user-3.bounce.garden.example>"
    uris = re.fullmatch(r"<(https://[^<>\s]+)>, <mailto:([^<>\s?]+)\?subject=unsubscribe>", message["list-unsubscribe"])
    assert uris is not None
    https, mailto = uris.groups()
    assert https == unsubscribe
    assert links.read(KEYRING.derive("unsubscribe"), https.removeprefix("https://go.garden.example/u/")) == (3, 7, 1)
    whose = return_path.ReturnPath(3, 7, 1, int(COMPOSED_AT // 86400))
    assert return_path.read(KEYRING.derive("unsubscribe"), mailto, return_path.UNSUBSCRIBE) == whose
    assert return_path.read(KEYRING.derive("return-path"), mail_from.decode()) == whose
    assert return_path.read(KEYRING.derive("return-path"), "b-" + message["x-fblid"]) == whose
    assert mail_from.endswith(b"@bounce.garden.example")
    for name in message:
        assert len(message.get_all(name, [])) == 1, "B4: a header stands once"


def test_no_uri_is_folded_inside():
    compiled = campaign(public_url="https://" + "a." * 100 + "example/" + "p" * 200, server=msgspec.structs.replace(SERVER, link_domain=""))
    wire = one(compiled, recipient())[2]
    [uri] = re.findall(rb"\r\nList-Unsubscribe: <(https://[^\r\n<>]+)>,\r\n <mailto:[^\r\n<>]+>\r\n", wire)
    assert len(uri) > 400


def test_the_same_input_gives_the_same_octets_in_every_attempt_and_process_order():
    first = campaign().build(RECIPIENTS, composed_at=COMPOSED_AT, attempt=1)
    other = campaign()
    assert other.build(RECIPIENTS, composed_at=COMPOSED_AT, attempt=4) == first
    assert [other.build([to], composed_at=COMPOSED_AT, attempt=2)[0] for to in reversed(RECIPIENTS)][::-1] == first
    later = other.build(RECIPIENTS, composed_at=COMPOSED_AT + 86400, attempt=5)
    ids = [[parsed(answer[2])["message-id"] for answer in answers if not isinstance(answer, Invalid)] for answers in (first, later)]
    assert ids[0] == ids[1], "R7: composed again on another day, the Message-ID stays"
    assert len(set(ids[0])) == len(RECIPIENTS)
    assert all(re.fullmatch(r"<[a-z2-7]{26,}@bounce\.garden\.example>", each) for each in ids[0])


def test_message_ids_of_another_campaign_or_key_are_others():
    wires = [one(campaign(), recipient())[2], one(campaign(id=8), recipient())[2]]
    wires.append(one(CompiledCampaign(CONTENT, SERVER, Keyring(b"another key of thirty-two octets"), PUBLIC_URL), recipient())[2])
    assert len({parsed(wire)["message-id"] for wire in wires}) == 3


@pytest.mark.parametrize(
    ("html", "text", "kind"), [("<p>Hi {{ subscriber.city }}</p>", "", "text/html"), ("", "Hi {{ subscriber.city }}", "text/plain")]
)
def test_a_campaign_with_one_part_has_one_part(html, text, kind):
    message = parsed(one(campaign(html=html, text=text), recipient(city="Ürb"))[2])
    assert message.get_content_type() == kind
    assert not message.is_multipart()
    assert said(message) == (html or text).replace("{{ subscriber.city }}", "Ürb") + "\n"


MERGED = [
    "a\r\nBcc: x@y.example",
    "a\nb",
    "a\rb",
    "a\0b",
    "=?utf-8?q?=0d=0a?=",
    "a\u2028b",
    "a\u2029b",
    "a\u202eb",
    "a\x1bb",
    "a\x85b",
    "x" * 1_000_000,
]


@pytest.mark.parametrize("value", MERGED, ids=ascii)
@pytest.mark.parametrize("field", ["subject", "from_name"])
def test_merge_data_that_could_break_a_header_is_refused_never_cleaned(field, value):
    changes: dict[str, Any] = {"text": "hi", "html": "", field: "Dear {{ subscriber.nick }}"}
    compiled = campaign(**changes)
    error = refusal(compiled, recipient(2, nick=value))
    assert error.field == field
    assert error.reason.startswith("bad merge data: ")


@pytest.mark.parametrize("value", ["a\r\nb", "a\u2028b\u202e", "x" * 100_000, ".\r\n.\r\nMAIL FROM:<x>", "\x1b[31m", "\r\n.\r\n"])
def test_the_same_in_a_body_is_only_text(value):
    wire = one(campaign(subject="News", text="[{{ subscriber.nick }}]", html=""), recipient(2, nick=value))[2]
    assert_sound(wire)
    assert said(parsed(wire)) == f"[{normalised(value)}]\n"


@pytest.mark.parametrize("data", [b'{"nick":"a\\u0000b"}', b'{"nick":"\\ud800"}', b"{", b"[1]", b'"x"', b"{}x", b'{"a":' * 5000])
def test_merge_data_that_is_no_sound_json_object_is_refused(data):
    compiled = campaign(subject="News", text="{{ subscriber.nick }}")
    error = refusal(compiled, Recipient(2, 2, "ann@shore.example", msgspec.Raw(data)))
    assert error.field == "merge data"


def test_markup_in_merge_data_is_escaped_in_html_only():
    value = '<script>"it\'s" & </a>'
    message = parsed(
        one(campaign(text="{{ subscriber.x }}", html='<a title="{{ subscriber.x }}">{{ subscriber.x | escape }}</a>'), recipient(x=value))[
            2
        ]
    )
    escaped = "&lt;script&gt;&#34;it&#39;s&#34; &amp; &lt;/a&gt;"
    assert said(message.get_body(("plain",))) == value
    assert said(message.get_body(("html",))) == f'<a title="{escaped}">{escaped}</a>'


def test_a_template_that_wants_too_much_fails_for_that_recipient_only():
    compiled = campaign(text="{% for i in (1..subscriber.n) %}x{% endfor %}", html="")
    error = refusal(compiled, recipient(2, n=10**9))
    assert error.field == "text"
    assert "range" in error.reason


@pytest.mark.parametrize(
    ("to", "octets", "smtputf8"),
    [
        ("ann@shore.example", b"ann@shore.example", False),
        ("Ann.O'Neill+tag@Shore.EXAMPLE", b"Ann.O'Neill+tag@Shore.EXAMPLE", False),
        ("kai@bücher.example", b"kai@xn--bcher-kva.example", False),
        ("kai@xn--bcher-kva.example", b"kai@xn--bcher-kva.example", False),
        ("søren@bücher.example", "søren@xn--bcher-kva.example".encode(), True),
        ('"a b"@shore.example', b'"a b"@shore.example', False),
        ("a" * 64 + "@shore.example", b"a" * 64 + b"@shore.example", False),
    ],
)
def test_an_address_as_it_travels(to, octets, smtputf8):
    _, rcpt, wire, needs = one(campaign(), recipient(email=to, city="x"))
    assert (rcpt, needs) == (octets, smtputf8)
    assert b"\r\nTo: " + octets + b"\r\n" in wire


@pytest.mark.parametrize(
    "to",
    [
        "",
        "x",
        "@",
        "a@",
        "@b.example",
        "a@b@c.example",
        "a b@c.example",
        "a@b c.example",
        "a@b..example",
        ".a@b.example",
        "a.@b.example",
        "a..b@c.example",
        "a@-b.example",
        "a@b-.example",
        "a@b.example.",
        "a@b.example\r\nBcc: x@y.example",
        "a\r\n@b.example",
        "a\x00@b.example",
        "a<b>@c.example",
        "a,b@c.example",
        "<a@b.example>",
        '"a"b@c.example',
        '"a@b.example',
        "a@[127.0.0.1]",
        "a@xn--ü.example",
        "a@xn--zzzzzzzz99999.example",
        "a" * 65 + "@b.example",
        "a@" + "b" * 64 + ".example",
        "a@" + "b." * 130 + "example",
        "a\u202e@b.example",
        "a\u2028@b.example",
        "a@b\u2028.example",
        "a@b_c.example",
        "a(b)@c.example",
    ],
)
def test_an_address_that_cannot_travel_is_refused(to):
    assert refusal(campaign(), recipient(2, email=to)).field == "email"


@given(
    st.text(st.sampled_from('abAZ09.-_+@"\\ é\u202e\r\n\0<>,;:ßx'), max_size=24).map(lambda text: text + "@b.example")
    | st.text(st.sampled_from("ab9.-_@éxn"), max_size=30)
)
@settings(max_examples=300, deadline=None)
def test_the_quick_look_at_an_address_agrees_with_the_thorough_one(text):
    from compose import header_rules

    try:
        expected = header_rules.address_octets("email", text)
    except Invalid:
        expected = None
    [answer] = campaign(text="x", html="", subject="s").build([recipient(email=text)], composed_at=COMPOSED_AT, attempt=1)
    assert (None if isinstance(answer, Invalid) else (answer[1], answer[3])) == expected


@pytest.mark.parametrize(
    ("server", "mail_from", "sender"),
    [
        ({"mfrom": "fixed@ses.example"}, b"fixed@ses.example", "letter@garden.example"),
        ({"mfrom": ""}, b"letter@garden.example", "letter@garden.example"),
        ({"mfrom": "", "enforced_from": "always@corp.example"}, b"always@corp.example", "always@corp.example"),
        ({"use_list_sender_as_mfrom": True}, b"lists@garden.example", "letter@garden.example"),
        ({"use_list_sender_as_from": True, "mfrom": "x@y.example"}, b"x@y.example", "lists@garden.example"),
        (
            {"use_list_sender_as_from": True, "enforced_from": "always@corp.example", "mfrom": "x@y.example"},
            b"x@y.example",
            "always@corp.example",
        ),
        ({"mfrom": "x@bücher.example"}, b"x@xn--bcher-kva.example", "letter@garden.example"),
    ],
)
def test_who_a_message_is_from(server, mail_from, sender):
    answer = one(campaign(msgspec.structs.replace(SERVER, **server)), recipient())
    assert answer[0] == mail_from
    message = parsed(answer[2])
    assert message["from"].addresses[0].addr_spec == sender
    assert "mailto:" not in message["list-unsubscribe"], "only a MFROM domain of ours takes mail for us"
    assert message["message-id"].endswith(f"@{sender.partition('@')[2]}>")


def test_without_a_list_sender_the_wish_for_one_changes_nothing():
    server = msgspec.structs.replace(SERVER, use_list_sender_as_from=True, use_list_sender_as_mfrom=True)
    answer = one(campaign(server, list_sender_email=""), recipient())
    assert answer[0].endswith(b"@bounce.garden.example")
    assert parsed(answer[2])["from"].addresses[0].addr_spec == "letter@garden.example"


def test_a_campaign_that_names_no_sender_is_from_that_of_its_list():
    message = parsed(one(campaign(from_email="", from_name=""), recipient())[2])
    assert (message["from"].addresses[0].addr_spec, message["from"].addresses[0].display_name) == ("lists@garden.example", "Garden Lists")
    named = parsed(one(campaign(from_email="", from_name="The Gardener"), recipient())[2])
    assert named["from"].addresses[0].display_name == "The Gardener"


def test_an_mfrom_domain_in_letters_travels_as_ascii():
    answer = one(campaign(msgspec.structs.replace(SERVER, mfrom="bücher.example")), recipient())
    assert answer[0].endswith(b"@xn--bcher-kva.example")


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("subject", {"subject": "a\r\nBcc: x@y.example"}),
        ("subject", {"subject": "a {{ subscriber.x }}\nb"}),
        ("subject", {"subject": "a\0"}),
        ("subject", {"subject": "{% if x %}=?utf-8?q?=0a?={% endif %}"}),
        ("subject", {"subject": "{% if x %}"}),
        ("from_name", {"from_name": "a\nb"}),
        ("from_name", {"from_name": "a{{ subscriber.x }}\u202e"}),
        ("from_email", {"from_email": "a@b.example\r\nBcc: c@d.example"}),
        ("from_email", {"from_email": "", "list_sender_email": ""}),
        ("reply_to", {"reply_to": "a@b.example, c@d.example"}),
        ("list.name", {"list_name": "a\r\nb"}),
        ("html", {"html": "{% include 'x' %}"}),
        ("text", {"text": "a\0b"}),
        ("html", {"html": "{{ x | nosuch }}"}),
    ],
)
def test_content_that_can_never_be_sent_is_refused_when_it_is_saved(field, changes):
    with pytest.raises(Invalid) as error:
        check(msgspec.structs.replace(CONTENT, **changes), SERVER, KEYRING, PUBLIC_URL)
    assert error.value.field == field


@pytest.mark.parametrize(
    ("field", "server"),
    [
        ("enforced_from", {"enforced_from": "x"}),
        ("mfrom", {"mfrom": "a b"}),
        ("mfrom", {"mfrom": "a\r\n@b.example"}),
        ("link_domain", {"link_domain": "a/b"}),
    ],
)
def test_a_delivery_server_that_can_never_work_is_refused(field, server):
    with pytest.raises(Invalid) as error:
        campaign(msgspec.structs.replace(SERVER, **server))
    assert error.value.field == field


@pytest.mark.parametrize(
    "url", ["", "ftp://x.example", "http://", "https://x.example/>", "https://x.example/\r\nX: y", "https://x.example/" + "y" * 500]
)
def test_a_public_url_that_cannot_stand_in_a_header_is_refused(url):
    with pytest.raises(Invalid, match="public_url"):
        campaign(msgspec.structs.replace(SERVER, link_domain=""), public_url=url)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.sampled_from(
    [*MERGED[:-1], "\r\n.\r\n", " ", "=", "é" * 200, "\t"]
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["first_name", "last_name", "city", "plan", "language"]), TEXT),
    st.sampled_from(["ann@shore.example", "kai@bücher.example"]),
)
@example({"first_name": "a\r\nBcc: x@y.example"}, "ann@shore.example")
def test_whatever_the_data_a_message_is_sound_or_refused(fields, to):
    compiled = campaign()
    clean = set(parsed(one(compiled, recipient(city="x"))[2]).keys())
    [answer] = compiled.build([recipient(2, email=to, **fields)], composed_at=COMPOSED_AT, attempt=1)
    if isinstance(answer, Invalid):
        assert answer.field in ("subject", "merge data")
        return
    wire = answer[2]
    assert_sound(wire)
    head = wire.partition(b"\r\n\r\n")[0] + b"\r\n"
    for field in re.split(rb"(?<=\r\n)(?![ \t])", head)[:-1]:
        assert header_fields.lines_are_sound(field, 998)
    message = parsed(wire)
    assert set(message.keys()) == clean, "no header more, none less"
    scope = compiled.scope(recipient(2, email=to, **fields), composed_at=COMPOSED_AT)
    [subject] = re.findall(rb"\r\n(Subject:(?:[^\r]|\r\n[ ])*\r\n)", head)
    assert header_fields.text(header_fields.unfolded(subject)[1]) == liquid_alone.render(CONTENT.subject, scope, html=False)
    assert said(message.get_body(("html",))) == normalised(liquid_alone.render(CONTENT.html, scope, html=True))


def test_data_is_not_read_where_no_template_asks_for_it():
    compiled = campaign(subject="News", text="Hello", html="{{ campaign.name }} {{ links.unsubscribe }}")
    one(compiled, Recipient(1, 1, "ann@shore.example", msgspec.Raw(b"not even JSON")))


def test_the_address_and_id_of_a_subscriber_win_over_fields_of_that_name():
    message = parsed(one(campaign(text="{{ subscriber.email }} {{ subscriber.id }}", html=""), recipient(9, id="x"))[2])
    assert said(message) == "ann@shore.example 1009\n"

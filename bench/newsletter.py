"""The newsletter that every bench sends: about 10 kB on the wire, nine merge fields, eight followed links, unsubscribe link, open pixel.

What a real letter has and what costs: text and HTML in multipart/alternative, HTML-escaped values, a condition, quoted-printable,
an encoded subject. The seed is fixed, so two runs send the same octets (but for the tokens). All domains end in `.example`.
"""

import random
from typing import Any, Final

import msgspec

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid

SUBJECT: Final = "{{ subscriber.first_name }}, die Flut kommt früh: news for {{ subscriber.city }}"
FROM_NAME: Final = "Hafenbrief – the harbour letter"
FROM_EMAIL: Final = "letter@harbour.example"
MFROM: Final = "bounces.harbour.example"
LINK_DOMAIN: Final = "go.harbour.example"

CITIES: Final = ("Zürich", "東京", "São Paulo", "Kraków", "Lyon", "Oslo", "Łódź", "Bergen", "Cork", "Malmö", "Gdańsk", "Tromsø")
PLANS: Final = ("deckhand", "pilot", "harbour master")
NAMES: Final = ("Søren", "Ines", "Åse", "Mateo", "Zoë", "Ivo", "Jürgen", "Aoife", "Tomás", "美咲", "Renée", "Piet")

_STORIES: Final = (
    ("Spring tide on Thursday", "tide",
     "The harbour office expects the highest water since 1962. Move what stands on the lower quay, turn the flower pots, and tell the "
     "neighbour who never reads these letters. The café on the pier stays open as long as the floor is dry – they have rubber boots in all "
     "sizes, and soup. Whoever has a boat at the inner wall should look at the lines on Wednesday; the night watch has spare rope."),
    ("The ferry has a new captain", "ferry",
     "After thirty-one years Håkon hands over the wheel. His last crossing was four minutes late, because half the town wanted to be on "
     "board and the other half stood on the quay and waved. His successor, Małgorzata, grew up on the other shore and promises to wait for "
     "those who come running. The timetable stays as it is, the coffee gets better, and the horn is heard on Sundays only after nine."),
    ("What the divers found", "divers",
     "A bell, two bicycles, a safe (empty, of course) and the sign of the old pharmacy. The bell goes to the school, where it will ring "
     "for the first time in eighty years; the bicycles go to whoever can prove that they are theirs. About the safe there are three "
     "stories, and we print them all: the one with the insurance, the one with the twins, and the one the baker’s grandmother told."),
    ("Seven knots everybody should know", "knots",
     "A bowline that does not slip, a hitch that comes off under load, and five others – drawn by hand, step by step, large enough for "
     "cold fingers. The sheet hangs in the boathouse, and subscribers can print it. If you only learn one of them, learn the second: it "
     "has saved more boats than the lighthouse, says the man who used to keep the lighthouse, and he would know."),
    ("Fish soup, the long way", "soup",
     "You need a morning, a pot that is too big, and patience with saffron. Our cook explains why the heads go in first and the mussels "
     "last, what “simmering” means (it does not mean boiling), and how to feed fourteen people with what was meant for six. There is a "
     "version without fish, for which he apologises, and which we have to admit is the one that was eaten first at the summer feast."),
    ("A lighthouse to let", "lighthouse",
     "One round room above the other, a hundred and eighteen steps, no straight wall for a wardrobe, and a view for which people cross "
     "the country. The council looks for somebody who keeps the garden, greets the school classes in May, and does not mind the wind. "
     "The lamp is automatic nowadays; the tenant has nothing to do with it, except on the night of the year when everybody is invited "
     "to climb up and switch it off and on again. Letters of application may be written by hand, and Ståle reads every one of them. "
     "Last time there were four hundred; it took him a winter, and he says it was the best winter since he stopped going to sea."),
    ("Questions from the quay", "questions",
     "Why do the swans stay? Who pays for the fireworks? May one swim in the inner basin before breakfast? We asked the people who know: "
     "because of Mrs Nordström’s bread; nobody, they are what is left from the ferry’s safety drill; and no, but half of the council does. "
     "Send us the next three questions, and we shall find someone who has the answer – or at least a story instead."),
)  # fmt: skip

_STORY: Final = """\
<tr><td style="padding:20px 30px;border-bottom:1px solid #d8dfe3">
<h2 style="margin:0 0 8px;font:600 21px/1.3 Georgia,serif;color:#12364a">{title}</h2>
<p style="margin:0 0 10px;font:16px/1.6 Georgia,serif;color:#2b2f33">{body}</p>
<p style="margin:0"><a href="https://www.harbour.example/letters/{link}?issue=31&amp;from=letter" style="color:#b2402a;font:600 15px \
Helvetica,Arial,sans-serif;text-decoration:none">Read the whole story</a></p></td></tr>
"""

_HEAD: Final = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Hafenbrief</title>
<meta name="viewport" content="width=device-width,initial-scale=1"></head>
<body style="margin:0;padding:0;background:#eef2f4"><table role="presentation" width="100%" cellpadding="0" cellspacing="0"><tr><td>
<table role="presentation" width="640" align="center" cellpadding="0" cellspacing="0" style="max-width:640px;background:#ffffff">
<tr><td style="padding:28px 30px 16px;border-bottom:4px solid #12364a">
<h1 style="margin:0;font:400 30px/1.2 Georgia,serif;color:#12364a">Moin {{ subscriber.first_name }} {{ subscriber.last_name }}</h1>
<p style="margin:8px 0 0;font:15px/1.5 Helvetica,Arial,sans-serif;color:#55606a">The letter from the harbour to {{ subscriber.city }}, \
{{ subscriber.country }}. Your favourite is still {{ subscriber.favourite }}.</p>
{% if subscriber.plan == "pilot" %}<p style="margin:8px 0 0">Pilots come aboard first: the gate opens for you at half past nine.</p>\
{% endif %}</td></tr>
"""

_FOOT: Final = """\
<tr><td style="padding:20px 30px;font:15px/1.6 Helvetica,Arial,sans-serif;color:#2b2f33">Plan: <strong>{{ subscriber.plan }}</strong>. \
Balance: {{ subscriber.balance }}. <a href="https://www.harbour.example/account">Your account</a></td></tr>
<tr><td style="padding:18px 30px;background:#12364a;font:13px/1.5 Helvetica,Arial,sans-serif;color:#d9e4ea">This letter goes to \
{{ subscriber.email }}, on board since {{ subscriber.joined }}.
<a href="{{ links.unsubscribe }}" style="color:#ffffff">Stop it</a>.</td></tr>
</table></td></tr></table></body></html>
"""


def long_html(repeat: int) -> str:
    """The letter with its stories `repeat` times: 1 gives about 10 kB on the wire, 12 about 100 kB."""
    return _HEAD + "".join(_STORY.format(title=title, body=body, link=link) for title, link, body in _STORIES) * repeat + _FOOT


HTML: Final = long_html(1)

_TEXT_STORIES: Final = "".join(
    f"{title.upper()}\n{body.split('. ')[0]}.\nhttps://www.harbour.example/letters/{link}?issue=31\n\n" for title, link, body in _STORIES
)
TEXT: Final = (
    "Moin {{ subscriber.first_name }} {{ subscriber.last_name }},\n\nthe letter from the harbour to {{ subscriber.city }}.\n\n"
    + _TEXT_STORIES
    + "This letter goes to {{ subscriber.email }}, on board since {{ subscriber.joined }}.\nStop it: {{ links.unsubscribe }}\n"
)


def rows(count: int) -> list[tuple[str, dict[str, Any]]]:
    """(address, merge data) of `count` recipients, the same in every run; hardly two of them have the same data."""
    dice = random.Random(31)
    made: list[tuple[str, dict[str, Any]]] = []
    for number in range(count):
        data = {
            "first_name": dice.choice(NAMES),
            "last_name": f"O’Brien-{dice.randrange(5000)}",
            "city": dice.choice(CITIES),
            "country": dice.choice(("NO", "IE", "CH", "日本")),
            "plan": dice.choice(PLANS),
            "joined": f"20{dice.randrange(10, 26)}-{dice.randrange(1, 13):02}-{dice.randrange(1, 28):02}",
            "balance": f"{dice.randrange(500_000) / 100:.2f} €",
            "favourite": "fish & <chips>",
        }
        made.append((f"letter.{number}@shore{number % 40}.example", data))
    return made


def recipients(count: int) -> list[Recipient]:
    """The same as the engine gets them from its queue."""
    return [Recipient(n, n, email, msgspec.json.encode(data)) for n, (email, data) in enumerate(rows(count), 1)]


def content(html: str = HTML, text: str = TEXT, subject: str = SUBJECT) -> CampaignContent:
    """The letter, or another one of the same sender."""
    return CampaignContent(
        id=31, version=1, user_id=1, list_id=1, name="Letter 31", subject=subject, from_name=FROM_NAME, from_email=FROM_EMAIL, reply_to="",
        html=html, text=text, list_name="Harbour", list_sender_email="", list_sender_name="", delivery_server_id=1, queued_at=0.0,
        track_links=True, track_opens=True,
    )  # fmt: skip


def compiled(letter: CampaignContent | None = None) -> CompiledCampaign:
    """Ready to be built for anybody, outside an engine."""
    server = DeliveryServer(
        id=1, user_id=1, name="relay", host="relay.example", mfrom=MFROM, link_domain=LINK_DOMAIN, open_domain=LINK_DOMAIN
    )
    return CompiledCampaign(letter or content(), server, Keyring(b"k" * 32), "http://127.0.0.1:8080")


def wire() -> tuple[bytes, bytes, bytes]:
    """(MAIL FROM, RCPT, octets) of the first recipient: the constant message of senders that compose nothing."""
    found = compiled().build(recipients(1), composed_at=1.7e9, attempt=1)[0]
    if isinstance(found, Invalid):
        raise found
    return found[0], found[1], found[2]

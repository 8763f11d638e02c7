"""What the demo sends, and to whom: a recipient list with the faults real lists have, and a newsletter in Liquid.

Everything is made from a fixed seed, so two runs of one size send the same mail. All domains end in the reserved top-level
domain `.example` (RFC 2606): nothing here can reach a real mailbox. How the sink answers is written into the address,
so one list shows deferrals and bounces beside ordinary deliveries.
"""

import csv
import random
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec

SUBJECT: Final = "Night trains, slow bread and the weather in {{ subscriber.city | default: 'your town' }}"
COLUMNS: Final = ("email", "first_name", "last_name", "city", "plan", "points", "joined", "topics")

_PROVIDERS: Final = (
    ("postbox.example", 30), ("letterbox.example", 22), ("pigeon.example", 14), ("inbox-north.example", 9),
    ("campus.example", 6), ("kontor.example", 5), ("poste.example", 4), ("grüße.example", 1),
)  # fmt: skip
_FIRST: Final = (
    "Amara", "Bjørk", "Cécile", "Dawit", "Eszter", "Félix", "Gülşen", "Håkon", "Inès", "Joaquín", "Katarzyna", "Leïla",
    "Miguel", "Nadia", "Ольга", "Παύλος", "Rūta", "Señor", "Tuğba", "Úrsula", "Văn", "Wanjiru", "陽子", "子轩", "ليلى", "Zdeněk",
)  # fmt: skip
_LAST: Final = (
    "Abebe", "Bergström", "Castaño", "Đorđević", "Eriksen", "Ferreira", "Grünwald", "Hernández", "Ivanova", "Jóhannsdóttir",
    "Kovács", "Łukasik", "McCarthy", "N’Diaye", "O’Connor", "Petrović", "佐藤", "Tạ", "Yılmaz", "de la Cruz",
)  # fmt: skip
_CITIES: Final = (
    "Gdańsk", "Málaga", "Tromsø", "Zürich", "Debrecen", "Québec", "İzmir", "京都", "Nairobi", "Cork", "Thessaloníki", "São Luís",
    "Chișinău", "Ypres",
)  # fmt: skip
# What the sink makes of the local part up to `+` (`bench.sink_script` has the table)
_DEFER_ONCE: Final = ("defer", "defer-dot")
_BOUNCE: Final = ("bounce", "full", "block")
_TOPICS: Final = ("trains", "bread", "maps", "radio", "gardens", "books")


class DemoList(msgspec.Struct, kw_only=True):
    """What was written, and what must therefore come out at the other end."""

    path: Path
    rows: int
    good: int
    faulty: dict[str, int]  # kind of fault -> rows
    deferring: int  # recipients the sink refuses once or twice before it takes them
    bouncing: int
    suppressed: list[str]  # addresses to suppress before the start; none of them defers or bounces


def write_list(path: Path, recipients: int, *, seed: int = 20) -> DemoList:
    """Write `recipients` rows of CSV (UTF-8, RFC 4180) to `path`: about 1 % faulty, 4 % deferring, 1.5 % bouncing."""
    rng = random.Random(seed)
    domains, weights = [name for name, _ in _PROVIDERS], [weight for _, weight in _PROVIDERS]
    small = [f"{noun}{number}.example" for noun in ("atelier", "garage", "praxis", "verein", "shop") for number in range(1, 60)]
    faulty: Counter[str] = Counter()
    result = DemoList(path=path, rows=recipients, good=0, faulty={}, deferring=0, bouncing=0, suppressed=[])
    previous = ""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\r\n")
        out.writerow(COLUMNS)
        for number in range(1, recipients + 1):
            domain = rng.choices(domains, weights)[0] if rng.random() < 0.8 else rng.choice(small)
            name = rng.choice(("news", "hello", "k.m", "letters+club", "first_last", "box"))
            row = [
                f"{name}{number}@{domain}", rng.choice(_FIRST), rng.choice(_LAST), rng.choice(_CITIES),
                rng.choice(("reader", "friend", "patron")), str(rng.randrange(0, 2500)),
                f"20{rng.randrange(14, 26)}-{rng.randrange(1, 13):02}-{rng.randrange(1, 29):02}",
                " ".join(rng.sample(_TOPICS, rng.randrange(1, 4))),
            ]  # fmt: skip
            lot = rng.random()
            if lot < 0.01 and previous:
                faulty[_spoil(row, rng, number, previous)] += 1
            else:
                if lot < 0.035:
                    row[0] = f"{rng.choice(_DEFER_ONCE)}+r{number}@{domain}"
                    result.deferring += 1
                elif lot < 0.05:
                    row[0] = f"defer2+r{number}@{domain}"
                    result.deferring += 1
                elif lot < 0.065:
                    row[0] = f"{rng.choice(_BOUNCE)}+r{number}@{domain}"
                    result.bouncing += 1
                elif lot < 0.07:
                    result.suppressed.append(row[0])
                elif lot < 0.073:
                    # Not a fault: a line break is data like any other. It may stand in a body and can never reach a header.
                    row[1] = "Mallory\r\nBcc: everybody@elsewhere.example"
                previous = row[0]
                result.good += 1
            out.writerow(row)
    result.faulty = dict(faulty)
    return result


def _spoil(row: list[str], rng: random.Random, number: int, previous: str) -> str:
    """Make one row faulty in one of the ways lists are; returns the name of the way."""
    address = row[0]
    local, _, domain = address.partition("@")
    faults = {
        "no @ in the address": local + domain,
        "nothing after the @": local + "@",
        "nothing before the @": "@" + domain,
        "a blank in the address": f"{local} {number}@{domain}",
        "two dots in a row": f"{local}..x@{domain}",
        "two @ in the address": f"{local}@@{domain}",
        "a name over 64 octets": f"{'very-' * 14}{number}@{domain}",
        "no address": "",
        "the address of an earlier row": previous.upper() if rng.random() < 0.5 else previous,
        "a NUL in a field": address,
        "a column too many": address,
    }
    fault = rng.choice(list(faults))
    row[0] = faults[fault]
    if fault == "a NUL in a field":
        row[3] = "Bro\x00ken"
    elif fault == "a column too many":
        row.append("surplus")
    return fault


TEXT: Final = """\
Dear {{ subscriber.first_name | default: "reader" }},

here is the letter for everyone in {{ subscriber.city }} who would rather arrive slowly.

THE 22:14 STILL RUNS
We took the sleeper across four borders with a bag of apples and no plan. The attendant has kept a logbook since 1998: who snored, who \
proposed, who got out one station too early and stayed for a year. He let us read the good pages.
https://www.slowpost.example/letters/night-train?issue=12&from=letter#platform-9

BREAD THAT TAKES THREE DAYS
Flour, water, salt, and the courage to do nothing. Our baker explains why the second night matters more than the oven – and what to do \
when a guest arrives on day two.
https://www.slowpost.example/kitchen/three-day-bread

A MAP DRAWN BY POSTMEN
Every dog, every broken gate, every house where somebody always opens the door: Zoltán, Åse and 美咲 copied forty years of pencil notes \
onto one sheet.
https://www.slowpost.example/maps/postmen
{% if subscriber.plan == "patron" %}
You are a patron, thank you: the printed map is in the post to you.
{% endif %}
What you asked for: {{ subscriber.topics | split: " " | join: ", " }}. Points collected so far: {{ subscriber.points }}.

This letter goes to {{ subscriber.email }}, a reader since {{ subscriber.joined }}.
Stop it at any time: {{ links.unsubscribe }}
"""

_STORY: Final = """\
<tr><td style="padding:18px 28px;border-bottom:1px solid #e4ded2">
<h2 style="margin:0 0 8px;font:600 20px/1.3 Georgia,serif;color:#1f3d36">{title}</h2>
<p style="margin:0 0 10px;font:16px/1.55 Georgia,serif;color:#33302a">{body}</p>
<p style="margin:0"><a href="{link}" style="color:#a4441f;font:600 15px Helvetica,Arial,sans-serif">{more}</a></p>
</td></tr>
"""

_STORIES: Final = (
    ("The 22:14 still runs",
     ("We took the sleeper across four borders with a bag of apples and no plan. The attendant has kept a logbook since 1998: who snored, "
     "who proposed, who got out one station too early and stayed for a year. He let us read the good pages, and asked us to leave out the "
     "name of the minister who was found asleep in the luggage van. We promised; he winked; the train was four minutes early."),
     "https://www.slowpost.example/letters/night-train?issue=12&amp;from=letter#platform-9", "Climb aboard"),
    ("Bread that takes three days",
     ("Flour, water, salt, and the courage to do nothing. Our baker explains why the second night matters more than the oven – and what to "
     "do when a guest arrives on day two. There is a table with times for warm kitchens and cold ones, and a short apology to everyone who "
     "followed last month’s recipe to the letter: it was <em>twelve</em> hours, not two."),
     "https://www.slowpost.example/kitchen/three-day-bread", "To the recipe"),
    ("A map drawn by postmen",
     ("Every dog, every broken gate, every house where somebody always opens the door: Zoltán, Åse and 美咲 copied forty years of "
     "pencil notes onto one sheet. It shows a town no satellite has seen. We print it large, with the jokes left in, the names left out."),
     "https://www.slowpost.example/maps/postmen", "Unfold the map"),
    ("Letters to us",
     ("Ondřej wants to know whether a fax is slow enough to count. Yes. Thandiwe has counted the clocks in her station: eleven, of which "
     "one is right. “I set my watch by the wrong ones,” she writes, “they agree with each other.” We have sent her the twelfth."),
     "https://www.slowpost.example/readers/12", "Write back"),
)  # fmt: skip

HTML: Final = (
    """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Slow Post</title>
<meta name="viewport" content="width=device-width,initial-scale=1"></head>
<body style="margin:0;padding:0;background:#f3eee4">
<table role="presentation" width="100%" cellpadding="0" cellspacing="0" style="background:#f3eee4"><tr><td align="center">
<table role="presentation" width="620" cellpadding="0" cellspacing="0" style="max-width:620px;background:#fffdf8">
<tr><td style="padding:26px 28px 14px;border-bottom:3px solid #1f3d36">
<p style="margin:0;font:700 13px Helvetica,Arial,sans-serif;letter-spacing:2px;color:#a4441f">SLOW POST · No. 12</p>
<h1 style="margin:6px 0 0;font:400 28px/1.2 Georgia,serif;color:#1f3d36">Good evening, {{ subscriber.first_name | default: "reader" }}</h1>
</td></tr>
<tr><td style="padding:16px 28px;font:16px/1.55 Georgia,serif;color:#33302a">The letter for everyone in
<strong>{{ subscriber.city }}</strong> who would rather arrive slowly.
{% if subscriber.plan == "patron" %}You are a patron, thank you: the printed map is in the post to you.\
{% else %}Become a patron and we send the map on paper.{% endif %}</td></tr>
"""
    + "".join(_STORY.format(title=title, body=body, link=link, more=more) for title, body, link, more in _STORIES)
    + """\
<tr><td style="padding:18px 28px;font:15px/1.5 Helvetica,Arial,sans-serif;color:#33302a">
<p style="margin:0 0 6px">What you asked us to write about:</p>
<ul style="margin:0;padding-left:20px">
{% assign topics = subscriber.topics | split: " " %}{% for topic in topics %}<li>{{ topic | capitalize }}</li>
{% endfor %}</ul>
<p style="margin:12px 0 0">Points collected so far: <strong>{{ subscriber.points }}</strong></p></td></tr>
<tr><td style="padding:18px 28px;background:#1f3d36;font:13px/1.5 Helvetica,Arial,sans-serif;color:#dfe8e2">
This letter goes to {{ subscriber.email }}, a reader since {{ subscriber.joined }}.
<a href="{{ links.unsubscribe }}" style="color:#ffffff">Stop it at any time</a>.</td></tr>
</table></td></tr></table></body></html>
"""
)

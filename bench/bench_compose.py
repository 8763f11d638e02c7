"""What one message costs to compose: the sample newsletter (about 10 kB on the wire), whole, unsigned, in groups of 8.

Run: `make bench`, or `python -m pytest bench/bench_compose.py --benchmark-only`. Every recipient has data of his own, so
the answers that filters keep are met as rarely as in a real list. Without the sample the template of the tests is taken.
"""

import os
import random
from pathlib import Path

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid

SAMPLE = Path(os.environ.get("SLUICE_SAMPLE", Path(__file__).resolve().parents[2] / "shared" / "sample"))
OURS = Path(__file__).resolve().parents[1] / "tests" / "data"
GROUP = 8
GROUPS = 1000

CITIES = ["Zürich", "東京", "São Paulo", "Kraków", "Lyon", "Oslo", "Łódź", "Bergen"]


def recipients() -> list[Recipient]:
    """8,000 of them, the same in every run."""
    dice = random.Random(1)
    rows = []
    for number in range(GROUP * GROUPS):
        data = {
            "first_name": f"Søren{dice.randrange(5000)}",
            "last_name": f"O'Brien {dice.randrange(5000)}",
            "city": dice.choice(CITIES),
            "country": "NO",
            "plan": dice.choice(["free", "team", "pro"]),
            "signup_date": f"20{dice.randrange(10, 26)}-{dice.randrange(1, 13):02}-{dice.randrange(1, 28):02}",
            "balance": f"{dice.randrange(500000) / 100}",
            "favourite": "Käse & Brot <b>",
            "language": "no",
        }
        rows.append(Recipient(number + 1, number + 1, f"x_{number}@shore{number % 40}.example", msgspec.Raw(msgspec.json.encode(data))))
    return rows


def campaign(subject: str, *, tracked: bool = False) -> CompiledCampaign:
    source = SAMPLE if (SAMPLE / "newsletter.html").exists() else OURS
    content = CampaignContent(
        id=7,
        version=1,
        user_id=3,
        list_id=5,
        name="Spring at the harbour",
        subject=subject,
        from_name="Hafenbrief – the harbour letter",
        from_email="letter@harbour.example",
        reply_to="",
        html=(source / "newsletter.html").read_text("utf-8"),
        text=(source / "newsletter.txt").read_text("utf-8"),
        list_name="Harbour",
        list_sender_email="",
        list_sender_name="",
        delivery_server_id=1,
        queued_at=0.0,
        track_links=tracked,
        track_opens=tracked,
    )
    server = DeliveryServer(
        id=1, user_id=3, name="relay", host="relay.example", mfrom="b.harbour.example", link_domain="go.harbour.example"
    )
    return CompiledCampaign(content, server, Keyring(b"k" * 32), "http://127.0.0.1:8080")


MERGED = "{{ subscriber.first_name }}, news from {{ subscriber.city }}"


@pytest.mark.parametrize(
    ("subject", "tracked"), [("News from the harbour", False), (MERGED, False), (MERGED, True)], ids=["plain", "merged", "merged-tracked"]
)
def test_compose_groups_of_eight(benchmark: BenchmarkFixture, subject: str, tracked: bool) -> None:
    """Reports seconds for 8,000 messages: divide by 8,000."""
    compiled = campaign(subject, tracked=tracked)
    rows = recipients()
    groups = [rows[at : at + GROUP] for at in range(0, len(rows), GROUP)]

    def compose_all() -> int:
        octets = 0
        for group in groups:
            for answer in compiled.build(group, composed_at=1.7e9, attempt=1):
                assert not isinstance(answer, Invalid)
                octets += len(answer[2])
        return octets

    octets = benchmark.pedantic(compose_all, rounds=5, warmup_rounds=1)  # type: ignore[no-untyped-call]
    assert benchmark.stats is not None
    benchmark.extra_info["octets per message"] = octets // len(rows)
    benchmark.extra_info["us per message"] = round(benchmark.stats.stats.min / len(rows) * 1e6, 2)


def test_compile_a_campaign(benchmark: BenchmarkFixture) -> None:
    """Parsing, translating and encoding ahead of time."""
    benchmark(campaign, "{{ subscriber.first_name }}, news")

"""What one message costs to compose: the sample newsletter (about 10 kB on the wire), whole, unsigned, in groups of 8.

Run: `python -m bench.bench_compose` for a table by stage, with the time to compile and the memory of a compiled campaign; or `make bench`,
or `python -m pytest bench/bench_compose.py --benchmark-only`. Every recipient has data of his own, so the answers that filters keep are
met as rarely as in a real list. Without the sample the template of the tests is taken.
"""

import hashlib
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from config.settings import Mail
from domain.campaign import CampaignContent, Recipient
from domain.egress import DeliveryServer
from domain.errors import Invalid

SAMPLE = Path(os.environ.get("SLUICE_SAMPLE", Path(__file__).resolve().parents[2] / "shared" / "sample"))
OURS = Path(__file__).resolve().parents[1] / "tests" / "data"
GROUP = 8
GROUPS = 1000
PART = 80  # messages timed at once: less than what a busy machine gives a process in one go

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
        rows.append(Recipient(number + 1, number + 1, f"x_{number}@shore{number % 40}.example", msgspec.json.encode(data)))
    return rows


MAIL: Final = Mail(
    x_mailer="Sluice", complaints_to="complaints@%sender_domain%", feedback_sender_id="harbour", cfbl_address="fbl@harbour.example"
)


def campaign(subject: str, *, tracked: bool = False, **changes: Any) -> CompiledCampaign:
    """The newsletter with every header there is, two custom ones among them."""
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
        reply_to="answers@harbour.example",
        html=(source / "newsletter.html").read_text("utf-8"),
        text=(source / "newsletter.txt").read_text("utf-8"),
        list_name="Harbour",
        list_sender_email="",
        list_sender_name="",
        delivery_server_id=1,
        queued_at=0.0,
        track_links=tracked,
        track_opens=tracked,
        headers=(("X-Campaign", "u%User:ID%-c%Campaign:ID%"), ("X-Reader", "r%Subscriber:ID%")),
    )
    server = DeliveryServer(
        id=1, user_id=3, name="relay", host="relay.example", mfrom="b.harbour.example", link_domain="go.harbour.example"
    )
    return CompiledCampaign(msgspec.structs.replace(content, **changes), server, Keyring(b"k" * 32), "http://127.0.0.1:8080", mail=MAIL)


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


def stages() -> dict[str, CompiledCampaign]:
    """The newsletter with one thing after the other; the difference of two lines is what a thing costs."""
    full = campaign(MERGED, tracked=True).content
    constant = re.sub(r"\{%.*?%\}|\{\{.*?\}\}", "", full.html)
    bare: dict[str, Any] = {"subject": "News", "text": "x", "html": "", "headers": ()}
    return {
        "headers and tokens, six words": campaign(**bare),
        "+ custom headers": campaign(**{**bare, "headers": full.headers}),
        "+ merge data read": campaign(**{**bare, "headers": full.headers, "text": "{{ subscriber.nothing }}"}),
        "+ subject with two values": campaign(**{**bare, "headers": full.headers, "subject": MERGED}),
        "newsletter without values": campaign(**{**bare, "html": constant}),
        "newsletter without values, followed links, pixel": campaign(**{**bare, "html": constant}, tracked=True),
        "newsletter, subject the same for all, not followed": campaign("News from the harbour"),
        "newsletter, not followed": campaign(MERGED),
        "newsletter, whole": campaign(MERGED, tracked=True),
    }


def _best(work: Callable[[int], int], parts: int, rounds: int) -> float:
    """CPU microseconds for one: for each part of the work its fastest round, so that what else runs on the machine counts little."""
    best = [1e9] * parts
    done = 1
    for _ in range(rounds):
        for part in range(parts):
            started = time.thread_time()
            done = work(part)
            best[part] = min(best[part], time.thread_time() - started)
    return sum(best) / parts / done * 1e6


def _resident_kilobytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def main() -> None:
    """Print the table."""
    rows = recipients()

    def build(compiled: CompiledCampaign) -> Callable[[int], int]:
        def work(part: int) -> int:
            for at in range(part * PART, part * PART + PART, GROUP):
                compiled.build(rows[at : at + GROUP], composed_at=1.7e9, attempt=1)
            return PART

        return work

    for name, compiled in stages().items():
        print(f"{_best(build(compiled), 50, 15):8.2f} us  {name}")
    data = os.urandom(10_000)
    print(f"{_best(lambda _: len(hashlib.sha256(data).digest()) // 32, 20, 20):8.2f} us  for comparison: SHA-256 of 10 kB")
    print(f"{_best(lambda part: bool(campaign(MERGED + str(part), tracked=True)), 5, 3) / 1000:8.2f} ms  to compile it, all parts")
    before = _resident_kilobytes()
    kept = [campaign(MERGED + str(number), tracked=True) for number in range(200)]
    for compiled in kept:
        compiled.build(rows[:GROUP], composed_at=1.7e9, attempt=1)
    print(f"{(_resident_kilobytes() - before) / len(kept):8.0f} kB  of memory for each compiled campaign that has sent")


if __name__ == "__main__":
    main()

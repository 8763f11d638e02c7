"""What SpamAssassin (offline rules) says of the MIME structure and header of our messages: nothing."""

import re
import shutil
import subprocess
from typing import Any

import pytest

from compose import markup
from domain.campaign import Attachment
from tests.compose.test_campaign import DATA
from tests.compose.test_provider_rules import HTML, TEXT, one

TIMEOUT_SECONDS = 120
# Rules about what a message is made of; the others are about words, networks and who relayed it
STRUCTURE = re.compile(
    r"MIME_|MISSING_|INVALID_|BAD_|MALFORM|HEADER_|HEAD_|SUBJ(?:ECT)?_|FROM_(?!GOV)|TO_|DATE_|MSGID|MESSAGE_ID|RATWARE|BASE64|"
    r"CHARSET|ILLEGAL|LONG_|FORGED_|UNPARSEABLE|TRACKER_ID|HTML_(?:MIME|BADTAG|EMBEDS|OBFUSCATE|TAG_BALANCE|NONELEMENT)"
)
# A received header is what the first server adds; without one SpamAssassin sees a message that nobody has sent
RECEIVED = (
    b"Received: from out.garden.example (out.garden.example [192.0.2.10])\r\n\tby mx.shore.example with ESMTPS id x1"
    b" for <p1@shore.example>;\r\n\tWed, 4 Mar 2026 05:06:08 +0000\r\n"
)
HARMLESS = {"NO_RELAYS", "NO_RECEIVED"}


def complaints(wire: bytes) -> list[str]:
    done = subprocess.run(["spamassassin", "-L", "-t"], input=RECEIVED + wire, capture_output=True, timeout=TIMEOUT_SECONDS, check=True)
    report = done.stdout.decode("utf-8", "replace")
    found = re.findall(r"^\s*-?[0-9.]+\s+([A-Z0-9_]{3,})\s", report[report.index("Content analysis details:") :], re.MULTILINE)
    assert "pts rule name" in report
    return [rule for rule in found if STRUCTURE.match(rule) and rule not in HARMLESS]


SAMPLES: dict[str, dict[str, Any]] = {
    "newsletter": {"html": (DATA / "newsletter.html").read_text("utf-8"), "text": (DATA / "newsletter.txt").read_text("utf-8")},
    "both parts": {"html": HTML, "text": TEXT},
    "text alone": {"html": "", "text": TEXT},
    "made text": {"html": HTML, "text": markup.text_of(HTML)},
    "attachment": {
        "html": HTML, "text": TEXT,
        "attachments": (Attachment(filename="Angebot März.pdf", content_type="application/pdf", content=b"%PDF-1.4\n" + bytes(2000)),),
    },
    "names": {"html": HTML, "text": TEXT, "from_name": "Gärten & Söhne", "subject": "Grüße aus dem Garten"},
    "transactional": {"html": HTML, "text": TEXT, "list_id": 0, "mail_class": "transactional"},
}  # fmt: skip


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("spamassassin") is None, reason="SpamAssassin is not installed (Debian: apt-get install spamassassin)"),
]


def test_it_would_say_what_is_wrong() -> None:
    wire = one(**SAMPLES["both parts"])
    assert "MISSING_DATE" in complaints(wire.replace(b"Date: ", b"X-Date: "))
    assert "MISSING_MID" in complaints(wire.replace(b"Message-ID: ", b"X-Message-ID: "))


@pytest.mark.parametrize("name", SAMPLES)
def test_spamassassin_has_nothing_against_structure_and_header(name: str) -> None:
    assert complaints(one(**SAMPLES[name])) == []

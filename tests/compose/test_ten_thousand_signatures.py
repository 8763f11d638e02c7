"""Ten thousand different messages, each signed with RSA and Ed25519: our own verifier and dkimpy agree with every signature."""

import random

import msgspec
import pytest

from compose.campaign import CompiledCampaign
from compose.verifying import verdicts as plain
from domain.campaign import Attachment
from tests.compose.test_campaign import COMPOSED_AT, CONTENT, KEYRING, PUBLIC_URL, SERVER, recipient
from tests.compose.test_signing import BOTH, records
from tests.reference.dkim_verdicts import verdicts as dkimpy

MESSAGES = 10_000
CAMPAIGNS = 200
ALPHABETS = ("abc ", "ab \t.\n", "Grüße ß\n", "Привет мир\n", "東京 🎉 \n", "=?:;<>\"'\\,@\n ", "\n", "x" * 60)


def said(rng: random.Random, most: int, *, line: bool = False) -> str:
    letters = "".join(rng.sample(ALPHABETS, rng.randint(1, 3)))
    text = "".join(rng.choices(letters, k=rng.randint(0, most)))
    return " ".join(text.split()) if line else text


def varied(rng: random.Random) -> CompiledCampaign:
    """One of many contents: parts, headers, names, attachments and alphabets differ."""
    files = tuple(
        Attachment(filename=f"{said(rng, 30, line=True).replace('/', '')}{n}.bin", content_type="application/octet-stream",
                   content=rng.randbytes(rng.randint(0, 3000)), content_id=rng.choice(("", f"c{n}")))
        for n in range(rng.choice((0, 0, 1, 3)))
    )  # fmt: skip
    name = "{{ subscriber.first_name }}"
    content = msgspec.structs.replace(
        CONTENT, id=rng.randint(1, 10**9), subject=f"{said(rng, 120, line=True)} {name}", from_name=said(rng, 60, line=True),
        list_name=said(rng, 60, line=True), text=rng.choice(("", f"{said(rng, 3000)}{name}{said(rng, 30)}")),
        html=rng.choice(("", f"<p>{name}</p><a href='https://a.example/{name}'>x</a>" + said(rng, 3000).replace("<", "&lt;"))),
        preheader=rng.choice(("", "short")), attachments=files, reply_to=rng.choice(("", "a@b.example")), track_opens=rng.random() < 0.5,
    )  # fmt: skip
    return CompiledCampaign(content, SERVER, KEYRING, PUBLIC_URL, BOTH)


@pytest.mark.slow
def test_every_signature_of_ten_thousand_varied_messages_verifies() -> None:
    rng = random.Random(6376)
    keys = records("rsa", "ed")
    seen = set()
    for _ in range(CAMPAIGNS):
        each = MESSAGES // CAMPAIGNS
        people = [recipient(n, f"p{rng.randint(1, 10**9)}@shore.example", first_name=said(rng, 200, line=True)) for n in range(1, each + 1)]
        for answer in varied(rng).build(people, composed_at=COMPOSED_AT + rng.randint(0, 10**6), attempt=1):
            assert isinstance(answer, tuple), answer
            seen.add(hash(answer[2]))
            assert [verdict.reason for verdict in plain(answer[2], keys)] == ["", ""]
            assert dkimpy(answer[2], keys) == [True, True]
    assert len(seen) == MESSAGES

"""Bad input 31: whatever a server writes into its refusal, it is one clean line in the ledger and in the accounting file (S15)."""

import csv
import io
from collections import Counter

from store.postgres import Pool
from tests.faults.peers import Fault, add_campaign, end_of, verdict
from tests.machine import Machine, until
from tests.peers import Peer

TEXTS = {
    b"5.1.1 \x1b[31mred\x1b[0m \x07bell": "escape",
    b"5.1.1 \x00NUL\x00": "nul",
    b"5.1.1 \"quoted\", and, commas; and 'these'": "quotes",
    b"=HYPERLINK(1)": "formula",
    b"5.1.1 \xff\xfe eight \xe2\x80\xa8 bits \xe2\x80\xae": "eight bits",
    b"5.1.1 " + b"long " * 3000: "long",
    b"5.1.1 \x85 next line \x9b": "c1",
}


async def test_the_text_of_a_refusal_is_stored_escaped_cut_and_as_one_field(machine: Machine, pool: Pool) -> None:
    fault = Fault("words", picked=0, recipients=len(TEXTS))
    replies = {f"p{n}@data.words.other.example": b"550 " + text + b"\r\n" for n, text in enumerate(TEXTS, 1)}
    async with Peer(recipients=replies) as peer:
        await machine.engine()
        campaign = await add_campaign(pool, fault, "data", peer.port)
        await end_of(pool, [campaign], 20.0)
        found = await verdict(pool, campaign, Counter())
    assert set(found.kinds.values()) == {"b"}, found.kinds
    for email, (diagnostic,) in found.diagnostics.items():
        assert len(diagnostic.encode()) <= 520, email
        assert all(" " <= sign <= "~" or sign > "\xa0" for sign in diagnostic), (email, diagnostic)
        assert not set("\u2028\u2029\u202a\u202b\u202c\u202d\u202e") & set(diagnostic), email

    async def written() -> list[list[str]]:
        files = sorted((machine.directory).rglob("acct-*.csv"))
        rows = [row for file in files for row in csv.reader(io.StringIO(file.read_text("utf-8")), strict=True)]
        return rows if len(rows) > len(TEXTS) else []

    rows = await until(written, "accounting files written", 10.0, machine)
    assert {len(row) for row in rows} == {len(rows[0])}, "a reply moved a field"
    assert not [cell for row in rows[1:] for cell in row if cell[:1] in ("=", "@")]

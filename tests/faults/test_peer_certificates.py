"""Row 32: certificates that are wrong. Where one is checked nothing falls to plain text and recipients wait; where none is, any will do.

`127.1` is the loopback to the resolver and a name to us, so its certificate is checked; `127.0.0.1` is an address, and it is not.
"""

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from store.postgres import Pool
from tests.engine.test_connect import make_certificate
from tests.faults.peers import Fault, add_campaign, end_of, sentences, taken, verdict
from tests.machine import Machine, until
from tests.peers import Peer

RECIPIENTS = 10
NAME: Final = "127.1"
# name in the certificate, days it is valid, whether its issuer is trusted, words of the sentence; empty: it is good
CERTIFICATES: Final[dict[str, tuple[str, int, bool, str]]] = {
    "good": (NAME, 1, True, ""),
    "another-name": ("other.example", 1, True, "mismatch"),
    "expired": (NAME, -2, True, "expired"),
    "self-signed": (NAME, 1, False, "self-signed certificate"),
}


async def test_a_wrong_certificate_is_named_and_never_leads_to_plain_text_while_unchecked_tls_takes_any(
    machine: Machine, pool: Pool, tmp_path: Path
) -> None:
    trusted, contexts = b"", {}
    for kind, (name, days, trust, _) in CERTIFICATES.items():
        (directory := tmp_path / kind).mkdir()
        contexts[kind] = make_certificate(directory, name, days=days, subject_name=kind)
        trusted += (directory / f"{name}.pem").read_bytes() if trust else b""
    (authorities := tmp_path / "authorities.pem").write_bytes(trusted)
    async with AsyncExitStack() as stack:
        checked: dict[tuple[str, str], tuple[Peer, int]] = {}
        unchecked: dict[str, tuple[Peer, int]] = {}

        async def add(kind: str, security: str, host: str) -> tuple[Peer, int]:
            peer = await stack.enter_async_context(Peer(("PIPELINING", "STARTTLS"), context=contexts[kind], implicit_tls=security == "tls"))
            fault = Fault(f"{kind}-{security}-{host.replace('.', '-')}", picked=0, recipients=RECIPIENTS)
            campaign = await add_campaign(pool, fault, "data", peer.port, host=host, state="draft")
            await pool.execute(
                "update delivery_servers set security = $2 where id = (select delivery_server_id from campaigns where id = $1)",
                campaign, security,
            )  # fmt: skip
            await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
            return peer, campaign

        for kind in CERTIFICATES:
            for security in ("starttls", "tls"):
                checked[kind, security] = await add(kind, security, NAME)
            unchecked[kind] = await add(kind, "starttls", "127.0.0.1")
        await machine.engine(0, SSL_CERT_FILE=str(authorities))
        good = [*unchecked.values(), *(both for (kind, _), both in checked.items() if not CERTIFICATES[kind][3])]
        bad = {key: both for key, both in checked.items() if CERTIFICATES[key[0]][3]}
        await end_of(pool, [campaign for _, campaign in good], 30.0)
        for peer, campaign in good:
            found = await verdict(pool, campaign, taken(peer))
            found.must_hold()
            assert set(found.kinds.values()) == {"d"}
            assert len(found.copies) == RECIPIENTS
            assert not peer.commands or "MAIL" not in " ".join(peer.commands).partition("STARTTLS")[0] or peer.implicit_tls

        async def words() -> dict[str, tuple[str, str]]:
            return await sentences(pool, machine.environment["SLUICE_REDIS_URL"])

        async def all_suspended() -> bool:
            return sum(state == "suspended" for state, _ in (await words()).values()) == len(bad)

        await until(all_suspended, "the wrong ones are suspended", 20.0, machine)
        said = await words()
        for (kind, security), (peer, campaign) in bad.items():
            sentence = said[f"{kind}-{security}-127-1 data"][1]
            assert f"the certificate of {NAME}" in sentence
            assert CERTIFICATES[kind][3] in sentence, sentence
            assert "recipients wait" in sentence
            assert not [line for line in peer.commands if line.startswith(("MAIL", "RCPT", "AUTH"))], "not in plain text, not at all"
            assert await pool.fetchval("select count(*) from accounting where campaign_id = $1", campaign) == 0

"""Every sent message can be made again octet for octet; seed addresses get a copy of a campaign that counts nowhere in it."""

import asyncio
import base64
import dataclasses

from compose import verifying
from compose.campaign import CompiledCampaign
from compose.signing import ParsedKeys
from config.settings import Mail, Settings
from control import sent as api
from control.services import Services
from domain.address import parse
from domain.campaign import Recipient
from domain.dkim import seal_context
from store import campaigns, egress, seeds, sent
from store.postgres import Pool, connection, transaction
from tests.engine.test_campaign_end_to_end import audit, completed
from tests.engine.test_message_streams import arrived
from tests.engine.test_signed_mail import KEYRING, SECRET, make_key, sent_part, sources
from tests.machine import Machine
from tests.reference.dkim_verdicts import verdicts
from tests.store import seed


async def test_messages_are_made_again_with_their_signatures_and_seeds_got_their_copy(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    await machine.sink()
    campaign = await seed.campaign(
        pool, recipients=20, port=machine.sink_port, state="draft", limits={"retry_schedule_seconds": [0.3]},
        text="Grüße, {{ subscriber.first_name }}\n.\n..\n", html='<p>Hi {{ subscriber.first_name }}</p><a href="https://a.example/">a</a>',
    )  # fmt: skip
    await pool.execute("update subscribers set email = 'defer1+' || id || '@people.example' where id % 5 = 0")
    user = await pool.fetchval("select user_id from campaigns where id = $1", campaign)
    async with transaction(pool) as conn:
        await seeds.add(conn, user, parse("glock@test.example"))
        await seeds.add(conn, None, parse("Glock@test.example"))
        await seeds.add(conn, None, parse("boss@office.example"))
    keys = [await make_key(pool, "s1"), await make_key(pool, "e1", "ed25519-sha256")]
    await machine.engine()
    async with connection(pool) as conn:
        version = (await campaigns.get(conn, None, campaign)).version
    await campaigns.start(pool, campaign, version)
    await campaigns.start(pool, campaign, version)
    await completed(machine, pool, campaign)
    await arrived(machine, 22)
    await asyncio.sleep(1.0)  # a third copy would have come by now

    # the seed copies are no part of the campaign
    found = await audit(pool, campaign)
    assert (found["input"], found["delivered"]) == (20, 20)
    wires = [sent_part(source).replace(b"\r\n", b"\n") for source in await sources(machine)]
    assert len(wires) == 22
    copies = [wire for wire in wires if b"To: glock@test.example" in wire or b"To: boss@office.example" in wire]
    assert len(copies) == 2
    assert all(b"Ada 1<" in copy for copy in copies)
    records = {key.record_name: key.record for key in keys}
    assert all(verdicts(copy.replace(b"\n", b"\r\n"), records) == [True, True] for copy in copies)

    # a key that signs no more still did so then
    await make_key(pool, "s2", activate=True)
    services = Services(pool, None, KEYRING, Settings())  # type: ignore[arg-type]  # nothing here asks Redis
    numbers = [(campaign, number) for number in range(1, 21)]
    others = await pool.fetch("select campaign_id, number from recipients where campaign_id <> $1", campaign)
    numbers += [(row["campaign_id"], row["number"]) for row in others]
    assert len(numbers) == 22
    for campaign_id, number in numbers:
        async with connection(pool) as conn:
            what = await sent.find(conn, user, campaign_id, number)
            then = await api.signed_with(conn, what, Mail())
        again = api.make_again(services, what, then)
        assert base64.b64decode(again.message).replace(b"\r\n", b"\n") in wires
        assert again.same_size, (again.size, again.recorded_size)
        assert [(each.algorithm, each.good) for each in again.signatures] == [("rsa-sha256", True), ("ed25519-sha256", True)]
        assert again.kind == "d"
    other = dataclasses.replace(services, settings=Settings(mail=Mail(x_mailer="x")))
    assert not api.make_again(other, what, then).same_size


async def test_the_plain_verifier_sees_every_change(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=1, state="draft")
    key = await make_key(pool, "s1")
    async with connection(pool) as conn:
        content = await campaigns.content(conn, campaign)
    async with connection(pool) as conn:
        server = await egress.get(conn, content.user_id, content.delivery_server_id)
    parsed = ParsedKeys()
    parsed.add(key, KEYRING.open(key.private_key_sealed, seal_context(key.id)))
    compiled = CompiledCampaign(content, server, KEYRING, "http://127.0.0.1:8080", parsed.signer([key]))
    [answer] = compiled.build([Recipient(1, 1, "a@b.example", b"{}")], composed_at=1.7e9, attempt=1)
    assert isinstance(answer, tuple)
    wire, records = answer[2], {key.record_name: key.record}
    assert [each.good for each in verifying.verdicts(wire, records)] == verdicts(wire, records) == [True]
    for changed in (
        wire.replace(b"Hello", b"Hallo", 1), wire.replace(b"Subject: Hello", b"Subject: Hullo"), wire + b"x\r\n",
        wire.replace(b"\r\n\r\n", b"\r\nSubject: again\r\n\r\n", 1), wire.replace(b"One-Click", b"One-Clack", 1),
    ):  # fmt: skip
        assert changed != wire
        assert [each.good for each in verifying.verdicts(changed, records)] == verdicts(changed, records) == [False]
    [verdict] = verifying.verdicts(wire, {})
    assert verdict.reason == "there is no record s1._domainkey.sender.example"
    assert {"list-unsubscribe", "list-unsubscribe-post", "from"} <= set(verdict.headers)

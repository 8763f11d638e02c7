"""Engines sign what they send: a key made before or during a campaign is used, and a verifier that knows only the DNS record agrees."""

import asyncio
from collections import Counter

from compose import dkim_keys
from config.keys import Keyring
from domain.dkim import Algorithm, DkimKey, seal_context
from store import batch_queue, dkim
from store.postgres import Pool
from tests.engine.test_campaign_end_to_end import completed
from tests.machine import Machine, until
from tests.reference.dkim_verdicts import verdicts
from tests.store import seed

SECRET = "5e" * 32
KEYRING = Keyring(bytes.fromhex(SECRET))


async def make_key(pool: Pool, selector: str, algorithm: Algorithm = "rsa-sha256", *, domain: str = "sender.example",
                   activate: bool | None = None, keyring: Keyring = KEYRING) -> DkimKey:  # fmt: skip
    made = await asyncio.to_thread(dkim_keys.make, algorithm)
    user = await pool.fetchval("select min(id) from users")
    return await dkim.create(
        pool, user, domain=domain, selector=selector, algorithm=algorithm, bits=made.bits, public_key=made.public_key,
        seal=lambda key_id: keyring.seal(made.private_key, seal_context(key_id)), activate=activate,
    )  # fmt: skip


async def sources(machine: Machine) -> list[bytes]:
    listed = (await machine.sink_json("/api/v1/messages?limit=500"))["messages"]
    return [await machine.sink_bytes(f"/api/v1/messages/{message['id']}/source") for message in listed]


def sent_part(source: bytes) -> bytes:
    """The message without what the sink may put in front of it."""
    return source[source.index(b"DKIM-Signature:") :]


async def test_mail_is_signed_with_every_active_key_of_the_from_domain(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    await machine.sink()
    campaign = await seed.campaign(
        pool, recipients=60, port=machine.sink_port, text="Grüße, {{ subscriber.first_name }}\n\n", state="draft"
    )
    keys = [await make_key(pool, "s1"), await make_key(pool, "e1", "ed25519-sha256"), await make_key(pool, "s2")]
    await make_key(pool, "b1", domain="bounces.sender.example")  # the return path's: only when the From domain has none
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)
    records = {key.record_name: key.record for key in keys if key.state == "active"}
    messages = await sources(machine)
    assert len(messages) == 60
    for message in messages:
        assert verdicts(sent_part(message), records) == [True, True]
    log = (machine.directory / "engine0.log").read_text()
    assert "PRIVATE" not in log


async def test_a_change_of_keys_reaches_a_campaign_that_is_running(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    await machine.sink()
    campaign = await seed.campaign(pool, recipients=400, port=machine.sink_port, limits={"max_messages_per_second": 60}, state="draft")
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)

    async def sent() -> int:
        return int((await machine.sink_json("/api/v1/counters"))["messages"])

    async def more_than(least: int) -> bool:
        return await sent() > least

    await until(lambda: more_than(10), "unsigned mail", 20, machine)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    keys = []
    for selector in ("s1", "s2"):
        keys.append(await make_key(pool, selector, activate=True))
        await batch_queue.publish_change(client, "dkim")
        before = await sent()
        await until(lambda before=before: more_than(before + 70), f"mail signed with {selector}", 20, machine)  # type: ignore[misc]
    await client.aclose()
    await completed(machine, pool, campaign)
    used: Counter[str] = Counter()
    for message in await sources(machine):
        if b"DKIM-Signature:" not in message:
            used["unsigned"] += 1
            continue
        for key in keys:
            if b"s=" + key.selector.encode() + b";" in message:
                used[key.selector] += 1
                if used[key.selector] <= 5:
                    assert verdicts(sent_part(message), {key.record_name: key.record}) == [True]
    assert sum(used.values()) == 400
    assert min(used["unsigned"], used["s1"], used["s2"]) > 5, used
    # Within a second of the first key's making, at 60 a second, and with some patience for a busy machine
    assert used["unsigned"] < 10 + 60 * 6, used


async def test_a_key_that_cannot_be_opened_is_named_and_the_return_paths_key_does_not_stand_in_for_it(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    await machine.sink()
    campaign = await seed.campaign(pool, recipients=10, port=machine.sink_port, state="draft")
    good = await make_key(pool, "e1", "ed25519-sha256")
    await make_key(pool, "s1", keyring=Keyring(bytes(32)))
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)
    for message in await sources(machine):
        assert verdicts(sent_part(message), {good.record_name: good.record}) == [True]
    log = (machine.directory / "engine0.log").read_text()
    assert "s1._domainkey.sender.example" in log
    assert "sealed with another secrets.key" in log


async def test_mail_of_a_domain_without_a_key_is_signed_for_its_return_path(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    await machine.sink()
    campaign = await seed.campaign(pool, recipients=5, port=machine.sink_port, state="draft")
    await pool.execute("update campaigns set from_email = 'news@customer.example' where id = $1", campaign)
    key = await make_key(pool, "b1", domain="bounces.sender.example")
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)
    messages = await sources(machine)
    assert len(messages) == 5
    for message in messages:
        assert b"d=bounces.sender.example;" in message
        assert verdicts(sent_part(message), {key.record_name: key.record}) == [True]

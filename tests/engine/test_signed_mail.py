"""Engines sign what they send: a key made before or during a campaign is used, and a verifier that knows only the DNS record agrees."""

import asyncio
import base64
from collections import Counter

from compose import dkim_keys, verifying
from config.keys import Keyring
from config.settings import Mail, Settings
from control import sent as api
from control.services import Services
from domain.dkim import Algorithm, DkimKey, seal_context
from store import batch_queue, dkim, sent, status, users
from store.postgres import Pool, connection, transaction
from tests.engine.test_campaign_end_to_end import completed
from tests.machine import Machine, until
from tests.reference.dkim_verdicts import verdicts
from tests.store import seed

SECRET = "5e" * 32
KEYRING = Keyring(bytes.fromhex(SECRET))


async def make_key(pool: Pool, selector: str, algorithm: Algorithm = "rsa-sha256", *, domain: str = "sender.example",
                   activate: bool | None = None, keyring: Keyring = KEYRING, user: int | None = None,
                   pair: dkim_keys.KeyPair | None = None) -> DkimKey:  # fmt: skip
    """A key of `user`, who is the first there is unless it is said."""
    made = await asyncio.to_thread(dkim_keys.make, algorithm) if pair is None else pair
    user = user or await pool.fetchval("select min(id) from users")
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
    pairs = [dkim_keys.make("rsa-sha256") for _ in range(2)]  # how long that takes is luck
    campaign = await seed.campaign(pool, recipients=400, port=machine.sink_port, limits={"max_messages_per_second": 30}, state="draft")
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)

    async def sent() -> int:
        return int((await machine.sink_json("/api/v1/counters"))["messages"])

    async def more_than(least: int) -> bool:
        return await sent() > least

    await until(lambda: more_than(10), "unsigned mail", 20, machine)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    keys = []

    async def signed_with(selector: str) -> bool:
        newest = (await machine.sink_json("/api/v1/messages?limit=6"))["messages"]
        found = [await machine.sink_bytes(f"/api/v1/messages/{message['id']}/source") for message in newest]
        return all(b"s=" + selector.encode() + b";" in message for message in found)

    for selector, pair in zip(("s1", "s2"), pairs, strict=True):
        keys.append(await make_key(pool, selector, activate=True, pair=pair))
        await batch_queue.publish_change(client, "dkim")
        await until(lambda selector=selector: signed_with(selector), f"mail signed with {selector}", 20, machine)  # type: ignore[misc]
    await client.aclose()
    await pool.execute("update delivery_servers set limits = '{}', version = version + 1")
    await pool.execute("update egress_version set version = version + 1")
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
    # Within a second of the first key's making, at 30 a second, and with some patience for a busy machine
    assert used["unsigned"] < 10 + 30 * 6, used


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


async def test_a_complaint_address_of_another_domain_has_that_domains_signature_or_is_left_out(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    machine.environment["SLUICE_MAIL__CFBL_ADDRESS"] = "fbl@operator.example"
    await machine.sink()
    both = await seed.campaign(pool, recipients=30, port=machine.sink_port, text="Grüße, {{ subscriber.first_name }}", state="draft")
    later = await seed.campaign(pool, recipients=5, port=machine.sink_port, subject="Later", state="draft")
    async with transaction(pool) as conn:
        operator = (await users.create_user(conn, users.ADMIN_NAME)).id
    second = await pool.fetchval("select user_id from campaigns where id = $1", later)
    keys = [
        await make_key(pool, "s1"),
        await make_key(pool, "e1", "ed25519-sha256"),
        await make_key(pool, "o1", domain="operator.example", user=operator),
        await make_key(pool, "p1", "ed25519-sha256", domain="operator.example", user=operator),
        await make_key(pool, "s2", user=second),
    ]
    await machine.engine()
    await pool.execute("update campaigns set state = 'preparing' where id = $1", both)
    await completed(machine, pool, both)
    records = {key.record_name: key.record for key in keys}
    wires = [sent_part(source) for source in await sources(machine)]
    assert len(wires) == 30
    for wire in wires:
        assert verdicts(wire, records) == [True, True, True, True]
        said = verifying.verdicts(wire, records)
        assert [each.domain for each in said] == ["sender.example"] * 2 + ["operator.example"] * 2
        assert all({"cfbl-address", "cfbl-feedback-id"} <= set(each.headers) for each in said)
        assert wire.count(b"\r\nCFBL-Address: fbl@operator.example; report=arf\r\n") == 1

    # without a key for that domain the mail goes out as ever, the address is not named, and the operator is told why
    for key in keys[2:4]:
        await dkim.retire(pool, operator, key.id)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    await batch_queue.publish_change(client, "dkim")
    await pool.execute("update campaigns set state = 'preparing' where id = $1", later)
    await completed(machine, pool, later)

    async def told() -> bool:
        found = await status.gather(pool, client)
        return any("no DKIM key signs for operator.example" in sentence for sentence in found.trouble)

    await until(told, "the operator is told", 30, machine)
    await client.aclose()
    plain = [sent_part(source) for source in await sources(machine) if b"Subject: Later" in source]
    assert len(plain) == 5
    for wire in plain:
        assert verdicts(wire, records) == [True]
        assert b"CFBL-" not in wire.upper()

    # and both are made again as they were, though the keys have retired since
    services = Services(pool, None, KEYRING, Settings(mail=Mail(cfbl_address="fbl@operator.example")))  # type: ignore[arg-type]
    for campaign, count in ((both, 4), (later, 1)):
        for number in (1, 5):
            async with connection(pool) as conn:
                what = await sent.find(conn, None, campaign, number)
                chosen = await api.signed_with(conn, what, services.settings.mail)
            again = api.make_again(services, what, chosen)
            assert again.size == again.recorded_size
            assert [each.good for each in again.signatures] == [True] * count
            assert base64.b64decode(again.message) in (wires if campaign == both else plain)

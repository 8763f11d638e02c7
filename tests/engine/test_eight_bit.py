"""8bit through real engines: only where it is asked for and the connection offers it; then nobody is refused, and it can be made again."""

import base64
import itertools
from typing import Any

from config.settings import Settings
from control.guards import Caller
from control.sent import MadeAgain, SentController
from control.services import Services
from store.postgres import Pool
from tests.engine.test_feedback_end_to_end import completed
from tests.engine.test_signed_mail import KEYRING, SECRET, make_key
from tests.machine import Machine
from tests.peers import Accepted, Peer
from tests.reference.dkim_verdicts import verdicts
from tests.store import seed

TEXT = "Grüße, {{ subscriber.first_name }}\n.\n..dots  \n{{ subscriber.long }}\n"
WITHOUT = "250-peer.example\r\n250 PIPELINING"


async def prepared(pool: Pool, port: int, recipients: int, text: str = TEXT, **limits: object) -> int:
    return await seed.campaign(pool, recipients=recipients, port=port, state="draft", text=text, limits={"eightbitmime": True, **limits})


async def made_again(pool: Pool, campaign: int, number: int) -> MadeAgain:
    services = Services(pool, None, KEYRING, Settings())  # type: ignore[arg-type]  # nothing here asks Redis
    handler: Any = SentController.message
    made: MadeAgain = await handler.fn(None, campaign_id=campaign, recipient=str(number), caller=Caller(0, "admin"), services=services)
    return made


async def by_recipient(pool: Pool, campaign: int, accepted: list[Accepted]) -> dict[int, Accepted]:
    """Number -> what the peer took for it; everybody was delivered to once, at the first attempt."""
    rows = await pool.fetch("select number, recipient, attempt, kind::text from accounting where campaign_id = $1", campaign)
    assert {(row["kind"], row["attempt"]) for row in rows} == {("d", 1)}
    taken = {each.rcpt: each for each in accepted}
    assert len(taken) == len(accepted) == len(rows)
    return {row["number"]: taken[row["recipient"]] for row in rows}


async def test_text_beyond_ascii_goes_as_8bit_where_the_server_offers_it(machine: Machine, pool: Pool) -> None:
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    async with Peer() as peer:
        campaign = await prepared(pool, peer.port, 8)
        key = await make_key(pool, "s1")
        await pool.execute("update subscribers set data = json_build_object('long', repeat('x', 5000)) where id % 4 = 0")
        await machine.engine()
        await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
        await completed(machine, pool, campaign)
    found = await by_recipient(pool, campaign, peer.accepted)
    assert not peer.violations
    eight_bit = [each for each in peer.accepted if b"\r\nContent-Transfer-Encoding: 8bit\r\n" in each.content]
    assert len(eight_bit) == 6, "the other two have a line that is too long"
    assert all("Grüße, Ada".encode() in each.content and b"\r\n.\r\n..dots  \r\n" in each.content for each in eight_bit)
    assert sum(command.endswith(" BODY=8BITMIME") for command in peer.commands) == 6
    for number, each in found.items():
        assert (each in eight_bit) is not each.content.isascii()
        assert max(map(len, each.content.split(b"\r\n"))) <= 998
        assert verdicts(each.content, {key.record_name: key.record}) == [True]
        again = await made_again(pool, campaign, number)
        assert base64.b64decode(again.message) == each.content
        assert again.same_size
        assert [signature.good for signature in again.signatures] == [True]
    # A server that is not to get 8bit any more changes nothing in what was sent
    await pool.execute("update delivery_servers set limits = '{}'")
    for number, each in found.items():
        assert base64.b64decode((await made_again(pool, campaign, number)).message) == each.content


async def test_a_connection_without_8bitmime_gets_7_bits_whatever_the_others_offer(machine: Machine, pool: Pool) -> None:
    """The first connection lacks it and the second has it, so what is composed as 8bit is composed again for the first."""
    machine.environment["SLUICE_SECRETS__KEY"] = SECRET
    async with Peer(offers=("PIPELINING", "8BITMIME"), script={"ehlo": [WITHOUT]}, reply_delay=0.02) as peer:
        campaign = await prepared(pool, peer.port, 240, max_connections=2)
        await machine.engine()
        await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
        await completed(machine, pool, campaign)
    found = await by_recipient(pool, campaign, peer.accepted)
    assert len(found) == 240
    order = [each.connection for each in peer.accepted]
    assert order[0] == 0
    assert set(order) == {0, 1}
    behind = itertools.dropwhile(lambda number: number == 0, order)
    assert 0 in behind, "both were used at the same time"
    assert not any(b"Encoding: 8bit" in each.content or not each.content.isascii() for each in peer.accepted if each.connection == 0)
    assert all(b"Encoding: 8bit" in each.content and not each.content.isascii() for each in peer.accepted if each.connection == 1)
    assert sum(command.endswith(" BODY=8BITMIME") for command in peer.commands) == order.count(1)
    for number in list(found)[::20]:
        assert base64.b64decode((await made_again(pool, campaign, number)).message) == found[number].content


async def test_a_server_without_8bitmime_gets_7_bits_and_refuses_nobody(machine: Machine, pool: Pool) -> None:
    await machine.sink("--no-8bitmime", "--no-smtputf8")
    await machine.engine()
    campaign = await prepared(pool, machine.sink_port, 30)
    await pool.execute("update campaigns set state = 'preparing' where id = $1", campaign)
    await completed(machine, pool, campaign)
    counters = await machine.sink_json("/api/v1/counters")
    assert counters["messages"] == 30
    assert counters["violations"]["undeclared_8bit"] == 0
    assert await pool.fetchval("select count(*) from accounting where kind = 'd' and attempt = 1") == 30

"""Direct messages through a real engine: their own words and headers each, ahead of a campaign, tried again, counted once."""

import asyncio
import email
import email.policy
import time
from collections.abc import Sequence

import msgspec

from store import accounting, batch_queue, feed, messages
from store.messages import Message, Part, Target
from store.postgres import Pool, transaction
from tests.machine import Machine, campaign_state, until
from tests.store import seed


async def beside(pool: Pool, campaign: int) -> Target:
    """The user and the way out of a campaign."""
    row = await pool.fetchrow("select user_id, delivery_server_id from campaigns where id = $1", campaign)
    assert row is not None
    return Target(user_id=row["user_id"], delivery_server_id=row["delivery_server_id"], mail_class="transactional", list_id=None)


async def target(pool: Pool, machine: Machine, limits: dict[str, object] | None = None) -> Target:
    return await beside(pool, await seed.campaign(pool, recipients=1, port=machine.sink_port, state="draft", limits=limits))


async def send(pool: Pool, to: Target, part: Part, addresses: Sequence[str], machine: Machine, **data: object) -> Message:
    rows = [(each, msgspec.json.encode(data).decode()) for each in addresses]
    async with transaction(pool) as conn:
        made = await messages.add(conn, to, part, {}, rows)
    client = batch_queue.connect(machine.environment["SLUICE_REDIS_URL"], 5.0)
    await batch_queue.publish_change(client, "campaigns")
    await client.aclose()
    return made


async def arrived(machine: Machine, count: int, seconds: float = 20.0) -> list[email.message.EmailMessage]:
    async def there() -> bool:
        return int((await machine.sink_json("/api/v1/counters"))["messages"]) >= count

    await until(there, f"{count} messages", seconds, machine)
    found = (await machine.sink_json("/api/v1/messages?limit=500"))["messages"]
    sources = await asyncio.gather(*(machine.sink_bytes(f"/api/v1/messages/{each['id']}/source") for each in found))
    return [email.message_from_bytes(source, policy=email.policy.default) for source in sources]


def body(message: email.message.EmailMessage, kind: str) -> str:
    found = message.get_body((kind,))
    assert found is not None
    return str(found.get_content())


async def test_messages_share_one_stream_and_say_what_each_of_them_says(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    to = await target(pool, machine)
    part = Part(name="receipt", subject="Order {{ subscriber.order }}", from_email="shop@sender.example", text="Thank you",
                html='<a href="https://shop.example/order">see</a>', track_links=True)  # fmt: skip
    first = await send(pool, to, part, ["a@people.example"], machine, order=1)
    assert len(await arrived(machine, 1, 5.0)) == 1
    second, third = (msgspec.structs.replace(part, text=f"Thanks {n}") for n in (2, 3))
    others = [
        await send(pool, to, second, ["p2@people.example"], machine, order=2),
        await send(pool, to, third, ["p3@people.example"], machine, order=3),
    ]
    again = await send(pool, to, part, ["b@people.example"], machine, order=4)
    mail = await arrived(machine, 4)
    said = {str(each["To"]): (each["Subject"], body(each, "plain").strip()) for each in mail}
    assert said == {
        "a@people.example": ("Order 1", "Thank you"), "p2@people.example": ("Order 2", "Thanks 2"),
        "p3@people.example": ("Order 3", "Thanks 3"), "b@people.example": ("Order 4", "Thank you"),
    }  # fmt: skip
    for each in mail:
        assert not any(name.lower().startswith("list-") for name in each), "nobody's list"
        link = body(each, "html")
        assert "/c/" in link
        assert "shop.example" not in link
    assert again.part == first.part
    assert len({first.campaign_id, again.campaign_id, *(each.campaign_id for each in others)}) == 1
    assert len({first.part, *(each.part for each in others)}) == 3

    async def rests() -> bool:
        return await campaign_state(pool, first.campaign_id) == "completed"

    await until(rests, "the stream rests", 20, machine)
    await send(pool, to, part, ["c@people.example"], machine, order=5)
    await arrived(machine, 5)
    await until(rests, "the stream rests again", 20, machine)
    audit = await accounting.audit(pool, first.campaign_id)
    assert (audit.input, audit.delivered, audit.missing, audit.multiple_terminal) == (5, 5, 0, 0)
    async with pool.acquire() as conn:
        assert await messages.outcomes(conn, again) == {"delivered": 1}


async def test_a_deferred_message_is_tried_again_with_its_own_words(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    to = await target(pool, machine, {"retry_schedule_seconds": [0.3]})
    part = Part(name="x", subject="one", from_email="shop@sender.example", text="one")
    made = []
    for subject in ("red", "green"):
        addresses = [f"defer1+{subject}@people.example", "bounce@people.example"]
        made.append(await send(pool, to, msgspec.structs.replace(part, subject=subject), addresses, machine))
    mail = await arrived(machine, 2)
    assert {str(each["To"]).split("+")[1].split("@")[0] for each in mail} == {str(each["Subject"]) for each in mail} == {"red", "green"}

    async def ended() -> bool:
        async with pool.acquire() as conn:
            return all([await messages.outcomes(conn, each) == {"delivered": 1, "bounced": 1} for each in made])

    await until(ended, "outcomes", 10, machine)
    async with pool.acquire() as conn:
        found = await messages.recipients(conn, made[1], 0, 10)
    assert [(each.state, each.attempts) for each in found] == [("delivered", 2), ("bounced", 1)]
    assert "5.1.1" in found[1].diagnostic


async def test_an_urgent_message_overtakes_a_campaign_that_fills_the_engine(machine: Machine, pool: Pool) -> None:
    await machine.sink()
    await machine.engine()
    campaign = await seed.campaign(pool, recipients=6000, port=machine.sink_port, limits={"max_messages_per_second": 200})
    to = await beside(pool, campaign)

    async def busy() -> bool:
        return int((await machine.sink_json("/api/v1/counters"))["messages"]) > 50

    await until(busy, "the campaign runs", 20, machine)
    began = time.monotonic()
    made = await send(pool, to, Part(name="x", subject="now", from_email="shop@sender.example", text="x"), ["u@people.example"], machine)

    async def delivered() -> bool:
        async with pool.acquire() as conn:
            return await messages.outcomes(conn, made) == {"delivered": 1}

    await until(delivered, "the urgent message", 8, machine)
    assert time.monotonic() - began < 15, "the campaign takes 30 s"
    assert await campaign_state(pool, campaign) == "running"


async def test_a_stream_that_gets_a_message_just_now_does_not_go_to_rest(pool: Pool) -> None:
    campaign = await seed.campaign(pool, recipients=1, state="draft")
    to = await beside(pool, campaign)
    part = Part(name="x", subject="x", from_email="shop@sender.example", text="x")
    async with transaction(pool) as conn:
        made = await messages.add(conn, to, part, {}, [("a@people.example", "{}")])
    await pool.execute("update batches set state = 'settled' where campaign_id = $1", made.campaign_id)
    async with pool.acquire() as conn, pool.acquire() as other:
        [stream] = await feed.active_campaigns(conn)
        assert stream.stream
        async with other.transaction():
            await messages.add(other, to, part, {}, [("b@people.example", "{}")])
            finishing = asyncio.create_task(feed.finish(conn, stream))
            await asyncio.sleep(0.2)
            assert not finishing.done(), "it waits for the message that comes in"
        assert not await finishing
    assert await campaign_state(pool, made.campaign_id) == "running"

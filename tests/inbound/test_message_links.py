"""Links of direct messages: each message shows its own page, and a way out of mail without a list leads out of all mail of the user."""

import msgspec

from domain import links
from domain.links import LinkParts
from store import messages
from store.messages import Message, Part, Target
from store.postgres import Pool, transaction
from tests.inbound.conftest import World
from tests.inbound.test_web import Site
from tests.inbound.test_web import site as site


async def sent(pool: Pool, world: World, name: str, list_id: int | None = None) -> Message:
    server = await pool.fetchval("select delivery_server_id from campaigns where id = $1", world.campaign_id)
    target = Target(
        user_id=world.user_id, delivery_server_id=server, mail_class="autoresponder" if list_id else "transactional", list_id=list_id
    )
    part = Part(name=name, subject=name, from_email="shop@mailer.example", html=f"<p>{name} {{{{ subscriber.order }}}}</p>")
    async with transaction(pool) as conn:
        made = await messages.add(conn, target, part, {}, [("Ada@reader.example", msgspec.json.encode({"order": name * 2}).decode())])
        await conn.execute("update batches set queued_at = now() where campaign_id = $1", made.campaign_id)
    return made


def link(world: World, purpose: str, message: Message) -> str:
    key = world.keyring.derive(purpose)
    return links.PATHS[purpose] + links.token(key, LinkParts(world.user_id, message.campaign_id, message.first_number))


async def test_each_message_of_a_stream_shows_its_own_page(site: Site, world: World, pool: Pool) -> None:
    made = [await sent(pool, world, name) for name in ("one", "two", "one")]
    assert len({each.campaign_id for each in made}) == 1
    pages = [(await site.ask("GET", link(world, "web-view", each)))[2] for each in made]
    assert pages == [b"<p>one oneone</p>", b"<p>two twotwo</p>", b"<p>one oneone</p>"]


async def test_who_leaves_mail_without_a_list_gets_no_more_mail_of_this_user(site: Site, world: World, pool: Pool) -> None:
    for list_id in (world.list_id, None):
        made = await sent(pool, world, "x", list_id)
        assert (await site.ask("POST", link(world, "unsubscribe", made)))[0] == 200
        found = await pool.fetch("select user_id, list_id, email_key from suppressions order by id desc limit 1")
        assert [tuple(row) for row in found] == [(world.user_id, list_id, "ada@reader.example")]
    assert site.told == 2

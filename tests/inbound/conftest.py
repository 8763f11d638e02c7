"""A user, a delivery server, a started campaign's row and its signed addresses: what the inbound side is tested against."""

import time
from typing import NamedTuple

import pytest

from config.keys import Keyring
from domain import links, return_path
from inbound.handling import Keys
from store import feed
from store.postgres import Pool


class World(NamedTuple):
    """One sent message and the keys its links are signed with."""

    keyring: Keyring
    user_id: int
    list_id: int
    campaign_id: int
    subscriber_id: int
    email: str

    @property
    def token(self) -> str:
        return self.token_of(1)

    def token_of(self, number: int) -> str:
        return links.token(self.keyring.derive("unsubscribe"), links.LinkParts(self.user_id, self.campaign_id, number))

    async def add_bob(self, pool: Pool) -> str:
        """Send the same to bob@reader.example, as number 2; the token of his message."""
        bob = await pool.fetchval(
            "insert into subscribers (user_id, list_id, email, email_key) values ($1, $2, 'bob@reader.example', 'bob@reader.example') "
            "returning id",
            self.user_id,
            self.list_id,
        )
        await pool.execute("insert into recipients values ($1, 2, $2, 'bob@reader.example', '{}')", self.campaign_id, bob)
        return self.token_of(2)

    @property
    def keys(self) -> Keys:
        return Keys(self.keyring.derive("return-path"), self.keyring.derive("unsubscribe"))

    def unsubscribe_address(self, *, number: int = 1) -> str:
        path = return_path.ReturnPath(self.user_id, self.campaign_id, number, 20000)
        return return_path.build(self.keyring.derive("unsubscribe"), "bounce.mailer.example", path, return_path.UNSUBSCRIBE)

    def return_path(self, *, days_ago: int = 0, domain: str = "bounce.mailer.example", number: int = 1) -> str:
        day = int(time.time() // 86400) - days_ago
        return return_path.build(
            self.keyring.derive("return-path"), domain, return_path.ReturnPath(self.user_id, self.campaign_id, number, day)
        )


@pytest.fixture
async def world(pool: Pool) -> World:
    async with pool.acquire() as conn:
        user = await conn.fetchval("insert into users (name) values ('tester') returning id")
        list_id = await conn.fetchval("insert into lists (user_id, name) values ($1, 'News') returning id", user)
        server = await conn.fetchval(
            "insert into delivery_servers (user_id, name, host, port, security, mfrom) "
            "values ($1, 'relay', '127.0.0.1', 2526, 'none', 'Bounce.Mailer.example') returning id",
            user,
        )
        subscriber = await conn.fetchval(
            "insert into subscribers (user_id, list_id, email, email_key) values ($1, $2, 'Ada@reader.example', 'ada@reader.example') "
            "returning id",
            user,
            list_id,
        )
        campaign = await conn.fetchval(
            "insert into campaigns (user_id, name, state, list_id, delivery_server_id, subject) "
            "values ($1, 'One', 'running', $2, $3, 'Hello') returning id",
            user,
            list_id,
            server,
        )
        await feed.make_room(conn, campaign)
        await conn.execute("insert into recipients values ($1, 1, $2, 'Ada@reader.example', '{}')", campaign, subscriber)
    return World(Keyring(bytes(range(32))), user, list_id, campaign, subscriber, "Ada@reader.example")

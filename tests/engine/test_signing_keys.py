"""engine.signing_keys against real stores: who signs for a complaint address of another domain, as its keys come, change and go."""

from compose.campaign import CompiledCampaign
from config.keys import Keyring
from config.settings import Mail
from domain.campaign import CampaignContent
from domain.egress import DeliveryServer
from engine.signing_keys import SigningKeys
from store import campaigns, dkim, egress, users
from store.postgres import Pool, connection, transaction
from tests.engine.test_signed_mail import KEYRING, make_key
from tests.store import seed

MAIL = Mail(cfbl_address="fbl@operator.example")


async def stored(pool: Pool, campaign: int) -> tuple[CampaignContent, DeliveryServer]:
    async with connection(pool) as conn:
        content = await campaigns.content(conn, campaign)
    async with connection(pool) as conn:
        return content, await egress.get(conn, content.user_id, content.delivery_server_id)


def selectors(compiled: CompiledCampaign) -> list[str]:
    return [] if compiled.signer is None else [key.selector for key in compiled.signer.keys]


async def test_keys_for_the_complaint_address_come_change_and_go_like_those_of_the_sender(pool: Pool) -> None:
    content, server = await stored(pool, await seed.campaign(pool, recipients=1, state="draft"))
    async with transaction(pool) as conn:
        operator = (await users.create_user(conn, users.ADMIN_NAME)).id
    await make_key(pool, "s1")
    await make_key(pool, "x1", user=operator)  # the operator's key never signs for a user's sender
    signing = SigningKeys(pool, KEYRING, MAIL)
    compiled = CompiledCampaign(content, server, KEYRING, "http://127.0.0.1:8080", await signing.signer(content, server), MAIL)

    async def now() -> tuple[list[str], bool]:
        await signing.follow([compiled])
        return selectors(compiled), "operator.example" in signing.trouble

    assert selectors(compiled) == ["s1"]
    assert await now() == (["s1"], True)
    assert "`sluice dkim new operator.example`" in signing.trouble

    own = await make_key(pool, "u1", domain="operator.example")
    assert await now() == (["s1", "u1"], False)
    first = await make_key(pool, "o1", domain="operator.example", user=operator)
    await make_key(pool, "e1", "ed25519-sha256", domain="operator.example", user=operator)
    assert await now() == (["s1", "o1", "e1"], False)
    second = await make_key(pool, "o2", domain="operator.example", user=operator)
    assert (await now())[0] == ["s1", "o1", "e1"], "it waits for its record"
    await dkim.activate(pool, operator, second.id)
    assert (await now())[0] == ["s1", "o2", "e1"]
    await dkim.delete(pool, operator, first.id)
    assert (await now())[0] == ["s1", "o2", "e1"]
    await _retire(pool, operator, "operator.example")
    assert await now() == (["s1", "u1"], False)
    await dkim.retire(pool, own.user_id, own.id)
    assert await now() == (["s1"], True)

    # one that cannot be opened is named, and so does not sign
    await make_key(pool, "o3", domain="operator.example", user=operator, keyring=Keyring(bytes(32)))
    assert (await now())[0] == ["s1"]
    assert "o3._domainkey.operator.example" in signing.trouble


async def test_a_complaint_address_of_the_senders_domain_asks_for_no_other_key(pool: Pool) -> None:
    content, server = await stored(pool, await seed.campaign(pool, recipients=1, state="draft"))
    async with transaction(pool) as conn:
        operator = (await users.create_user(conn, users.ADMIN_NAME)).id
    await make_key(pool, "s1")
    await make_key(pool, "o1", user=operator)
    await make_key(pool, "o2", domain="fbl.sender.example", user=operator)
    for mail in (Mail(), Mail(cfbl_address="fbl@sender.example"), Mail(cfbl_address="x@fbl.sender.example")):
        signing = SigningKeys(pool, KEYRING, mail)
        compiled = CompiledCampaign(content, server, KEYRING, "http://127.0.0.1:8080", await signing.signer(content, server), mail)
        assert selectors(compiled) == ["s1"]
        await signing.follow([compiled])
        assert (selectors(compiled), signing.trouble) == (["s1"], "")


async def _retire(pool: Pool, user: int, domain: str) -> None:
    for key in await dkim.active(pool, [user], [domain]):
        await dkim.retire(pool, user, key.id)

"""Campaigns in the store: what happens when requests meet."""

import asyncio

import pytest

from domain.errors import Conflict, Invalid
from store import campaigns, egress, lists
from store.postgres import Pool, connection, transaction
from tests.store import seed


async def test_a_start_and_a_deletion_of_what_it_needs_exclude_each_other(pool: Pool) -> None:
    for _ in range(5):
        campaign_id = await seed.campaign(pool, recipients=1, state="draft")
        async with connection(pool) as conn:
            campaign = await campaigns.get(conn, None, campaign_id)

        async def delete_list(list_id: int = campaign.list_id or 0) -> None:
            async with transaction(pool) as conn:
                await lists.delete(conn, None, list_id)

        results = await asyncio.gather(
            campaigns.start(pool, campaign_id, campaign.version),
            egress.delete(pool, None, campaign.delivery_server_id),
            delete_list(),
            return_exceptions=True,
        )
        # drafts need them too, so both deletions are refused whoever comes first
        assert [type(result) for result in results[1:]] == [Conflict, Conflict]
        assert isinstance(results[0], campaigns.Campaign)


async def test_only_the_content_that_was_checked_is_started(pool: Pool) -> None:
    campaign_id = await seed.campaign(pool, recipients=1, state="draft")
    async with connection(pool) as conn:
        before = await campaigns.get(conn, None, campaign_id)
        await campaigns.update(conn, campaign_id, {"subject": "other"})
    with pytest.raises(Conflict, match="changed while it was being started"):
        await campaigns.start(pool, campaign_id, before.version)


async def test_a_change_of_the_list_changes_nothing_of_a_started_campaign(pool: Pool) -> None:
    campaign_id = await seed.campaign(pool, recipients=1, state="draft")
    await pool.execute("update lists set sender_email = 'news@harbour.example', sender_name = 'Harbour'")
    async with connection(pool) as conn:
        campaign = await campaigns.start(pool, campaign_id, (await campaigns.get(conn, None, campaign_id)).version)
        before = await campaigns.content(conn, campaign_id)
        await lists.update(conn, None, campaign.list_id or 0, {"name": "Other", "sender_email": "other@harbour.example", "sender_name": ""})
        after = await campaigns.content(conn, campaign_id)
    assert (after.list_name, after.list_sender_email, after.list_sender_name) == (
        before.list_name,
        "news@harbour.example",
        "Harbour",
    )


async def test_nobody_subscribed_is_nobody_to_mail(pool: Pool) -> None:
    campaign_id = await seed.campaign(pool, recipients=2, state="draft")
    await pool.execute("update subscribers set state = 'unsubscribed'")
    with pytest.raises(Invalid, match="nobody on list"):
        await campaigns.start(pool, campaign_id, 1)


async def test_what_compose_is_given_is_what_engines_are_given(pool: Pool) -> None:
    from store import engines

    campaign_id = await seed.campaign(pool, recipients=1)
    async with connection(pool) as conn:
        content = await campaigns.content(conn, campaign_id)
    assert await engines.campaign_content(pool, campaign_id) == (content, "marketing")

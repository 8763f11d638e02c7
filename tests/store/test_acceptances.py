"""store.acceptances: the ledger against what receivers accepted, fault by fault."""

import itertools

import pytest

from domain.errors import NotFound
from store import acceptances
from store.acceptances import Accepted, Against
from store.postgres import Pool
from tests.store.campaigns import make_campaign


async def records(pool: Pool, campaign: int, text: str) -> None:
    """One record for each word `number kind`, e.g. `1d 1u 2b`; `D` is a delivery that was only assumed."""
    for word in text.split():
        number, kind = int(word[:-1]), word[-1]
        said = {"d": "250 ok", "D": "assumed delivered: lost connection", "b": "550 no"}.get(kind, "")
        await pool.execute(
            "insert into accounting values ($1, $2, 1, $3, now(), 1, 1, 1, 1, '', '', $4, '', (select email from recipients "
            "where campaign_id = $1 and number = $2))",
            campaign, number, kind.lower().encode(), said,
        )  # fmt: skip


async def compared(pool: Pool, campaign: int, *accepted: int, astray: dict[int, str] | None = None, other_mail: int = 0) -> Against:
    """`accepted`: the numbers receivers took, in parts of three; `astray`: for another address."""
    rows = await pool.fetch("select number, email from recipients where campaign_id = $1", campaign)
    emails: dict[int, str] = {row["number"]: row["email"] for row in rows} | (astray or {})
    parts = iter([list(accepted[at : at + 3]) for at in range(0, len(accepted), 3)])

    async def read() -> Accepted:
        numbers = next(parts, [])
        return numbers, [emails.get(number, "nobody@example.com") for number in numbers]

    return await acceptances.compare(pool, campaign, read, lambda: other_mail)


def counts(found: Against) -> dict[str, int]:
    return {name: value for name in found.__struct_fields__ if isinstance(value := getattr(found, name), int) and value}


async def test_a_ledger_that_says_what_the_receivers_say_is_clean(pool: Pool):
    campaign = await make_campaign(pool, 6)
    await records(pool, campaign, "1d 2d 3b 4x 5s")
    found = await compared(pool, campaign, 2, 1, other_mail=7)
    assert (counts(found), found.clean, found.examples) == ({"accepted": 2, "recipients": 2, "other_mail": 7}, True, {})


async def test_what_nobody_accepted_is_lost_unless_it_was_only_assumed(pool: Pool):
    campaign = await make_campaign(pool, 4)
    await records(pool, campaign, "1d 2d 3D 3u 4D 4u")
    found = await compared(pool, campaign, 1, 4)
    assert counts(found) == {"accepted": 2, "recipients": 2, "lost": 1, "assumed_delivered": 1}
    assert (found.clean, found.examples) == (False, {"lost": [await address(pool, campaign, 2)]})


async def test_copies_are_explained_by_as_many_uncertain_records(pool: Pool):
    campaign = await make_campaign(pool, 8)
    await records(pool, campaign, "1d 2d 2u 3d 3u 4d 4u 4u 5u 6u 6b")
    assert counts(await compared(pool, campaign, 1, 2, 2, 3, 4, 4, 4, 5, 5, 6)) == {
        "accepted": 10, "recipients": 6, "unrecorded": 1, "duplicates_announced": 4,
    }  # fmt: skip
    found = await compared(pool, campaign, 1, 1, 2, 2, 2, 3, 4, 7, 7, 7)
    assert (found.duplicates_announced, found.duplicates_unexplained, found.unrecorded, found.clean) == (1, 4, 1, False)
    assert found.examples == {"duplicates_unexplained": [await address(pool, campaign, number) for number in (1, 2, 7)]}


async def test_accepted_mail_that_is_recorded_as_bounced_needs_its_uncertain_record(pool: Pool):
    campaign = await make_campaign(pool, 6)
    await records(pool, campaign, "1b 2b 2u 3x 4s 5c 6d")
    found = await compared(pool, campaign, 1, 2, 3, 4, 5, 6)
    assert (found.false_bounced, found.unrecorded, found.clean) == (4, 0, False)
    assert len(found.examples["false_bounced"]) == 4


async def test_a_message_that_went_to_somebody_else_is_found_by_its_message_id(pool: Pool):
    campaign = await make_campaign(pool, 4)
    await pool.execute("update recipients set email = 'Zoë@bücher.example' where number = 2")
    await pool.execute("update recipients set email = 'Ann@one.example' where number = 3")
    await records(pool, campaign, "1d 2d 3d 4d")
    astray = {1: "somebody@else.example", 2: "zoë@xn--bcher-kva.example", 3: "ann@ONE.example"}
    found = await compared(pool, campaign, 1, 2, 3, 4, 99, astray=astray)
    assert (found.misaddressed, found.clean, found.examples) == (
        2, False, {"misaddressed": ["somebody@else.example", "nobody@example.com"]},
    )  # fmt: skip
    assert (found.accepted, found.lost) == (4, 0)


async def test_hundreds_of_copies_of_one_message_are_many_and_no_error(pool: Pool):
    campaign = await make_campaign(pool, 1)
    await records(pool, campaign, "1d")
    found = await compared(pool, campaign, *itertools.repeat(1, 300))
    assert (found.accepted, found.duplicates_unexplained) == (255, 254)


async def test_a_campaign_that_does_not_exist_is_said_so(pool: Pool):
    with pytest.raises(NotFound):
        await compared(pool, 7)
    with pytest.raises(NotFound):
        await acceptances.owner(pool, 7)


async def address(pool: Pool, campaign: int, number: int) -> str:
    return str(await pool.fetchval("select email from recipients where campaign_id = $1 and number = $2", campaign, number))

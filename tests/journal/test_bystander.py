"""journal.bystander: what a silent owner wrote is carried over without its lock, up to where it can be read."""

from pathlib import Path

import pytest

from journal import bystander
from journal.segment_files import VERSION, JournalDamaged, segment_path
from journal.segments import Journal
from store import accounting
from store.postgres import Pool
from tests.journal.records import outcome
from tests.store.campaigns import make_campaign

OWNER = "node.1.silent"


def owned(directory: Path, campaign: int, *, segment_bytes: int = 10**6) -> Journal:
    """The journal of a living owner: 1 to 4 delivered, one write each."""
    journal = Journal(directory, engine_id=OWNER, segment_bytes=segment_bytes)
    for number in range(1, 5):
        journal.append(outcome("d", number, campaign=campaign))
        journal.write()
    return journal


async def delivered(pool: Pool, campaign: int) -> int:
    return (await accounting.totals(pool, campaign)).delivered


async def test_all_of_it_is_carried_over_while_its_owner_holds_the_lock_and_the_rest_later(pool: Pool, tmp_path: Path):
    campaign, directory = await make_campaign(pool, 8), tmp_path / OWNER
    journal = owned(directory, campaign, segment_bytes=300)
    assert await bystander.carry_over(directory, pool) > 0
    assert await delivered(pool, campaign) == 4
    assert await bystander.carry_over(directory, pool) == 0
    journal.append(outcome("d", 5, campaign=campaign))
    journal.write()
    assert await bystander.carry_over(directory, pool) > 0
    assert await delivered(pool, campaign) == 5
    journal.close()


async def test_a_record_its_owner_was_stopped_in_is_left_for_later(pool: Pool, tmp_path: Path):
    campaign, directory = await make_campaign(pool, 8), tmp_path / OWNER
    journal = owned(directory, campaign)
    path = segment_path(directory, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    await bystander.carry_over(directory, pool)
    assert await delivered(pool, campaign) == 3
    path.write_bytes(whole)
    await bystander.carry_over(directory, pool)
    assert await delivered(pool, campaign) == 4
    journal.close()


@pytest.mark.parametrize("unfinished", [b"", b"SLUI", bytes(40)], ids=["empty", "cut", "zeros"])
async def test_a_segment_that_is_only_being_begun_is_no_damage(pool: Pool, tmp_path: Path, unfinished: bytes):
    campaign, directory = await make_campaign(pool, 8), tmp_path / OWNER
    journal = owned(directory, campaign)
    segment_path(directory, 2).write_bytes(unfinished)
    await bystander.carry_over(directory, pool)
    assert await delivered(pool, campaign) == 4
    journal.close()


async def test_garbage_in_the_middle_is_named_after_what_stands_before_it_was_carried_over(pool: Pool, tmp_path: Path):
    campaign, directory = await make_campaign(pool, 8), tmp_path / OWNER
    journal = owned(directory, campaign)
    path = segment_path(directory, 1)
    content = bytearray(path.read_bytes())
    size = len(outcome("d", 4, campaign=campaign))
    content[-2 * size + 20] ^= 0xFF  # in the third of four
    path.write_bytes(content)
    offset = len(content) - 2 * size
    for _ in range(2):  # and again, with nothing new before it
        with pytest.raises(JournalDamaged, match=rf"00000001\.journal: offset {offset}: .* next good record is at offset {offset + size}"):
            await bystander.carry_over(directory, pool)
        assert await delivered(pool, campaign) == 2
    journal.close()


async def test_another_version_is_refused_by_name_and_what_stands_before_it_is_carried_over(pool: Pool, tmp_path: Path):
    campaign, directory = await make_campaign(pool, 8), tmp_path / OWNER
    journal = owned(directory, campaign)
    journal.close()
    header = bytearray(segment_path(directory, 1).read_bytes())
    header[8] = VERSION + 1
    segment_path(directory, 2).write_bytes(header)
    with pytest.raises(JournalDamaged, match=rf"00000002\.journal: journal version {VERSION + 1}"):
        await bystander.carry_over(directory, pool)
    assert await delivered(pool, campaign) == 4
    segment_path(directory, 1).write_bytes(header)
    segment_path(directory, 2).unlink()
    with pytest.raises(JournalDamaged, match=rf"00000001\.journal: journal version {VERSION + 1}"):
        await bystander.carry_over(directory, pool)

"""Attachments of campaigns: files that are stored once and go with every message."""

from datetime import datetime

import msgspec

from domain.campaign import Attachment
from domain.errors import Conflict, Invalid, NotFound
from store.postgres import PooledConnection


class AttachmentInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An attachment without its content; `size` in bytes."""

    id: int
    campaign_id: int
    filename: str
    content_type: str
    content_id: str
    size: int
    created_at: datetime


_COLUMNS = "id, campaign_id, filename, content_type, content_id, length(content) as size, created_at"


async def add(conn: PooledConnection, campaign_id: int, attachment: Attachment, max_bytes: int) -> AttachmentInfo:
    """Add one to a draft, which the caller has looked up with its user; all of a campaign may have `max_bytes` together.

    Raises Conflict once the campaign was started, Invalid where it would be too much or a Content-ID is there already.
    """
    await _change(conn, campaign_id)
    there = await conn.fetchrow(
        "select coalesce(sum(length(content)), 0) as size, coalesce(bool_or(content_id = $2 and $2 <> ''), false) as twice "
        "from attachments where campaign_id = $1",
        campaign_id,
        attachment.content_id,
    )
    assert there is not None
    if there["twice"]:
        raise Invalid("content_id", "is that of another attachment of this campaign", attachment.content_id)
    size = there["size"] + len(attachment.content)
    if size > max_bytes:
        raise Invalid("attachments", f"would have {size} bytes together, at most {max_bytes} are allowed (mail.max_attachment_bytes)")
    row = await conn.fetchrow(
        "insert into attachments (campaign_id, filename, content_type, content_id, content) "
        f"values ($1, $2, $3, $4, $5) returning {_COLUMNS}",
        campaign_id,
        attachment.filename,
        attachment.content_type,
        attachment.content_id,
        attachment.content,
    )
    assert row is not None
    return AttachmentInfo(**dict(row))


async def of_campaign(conn: PooledConnection, campaign_id: int) -> tuple[Attachment, ...]:
    """All of them with their content, in the order in which they were added."""
    rows = await conn.fetch(
        "select filename, content_type, content_id, content from attachments where campaign_id = $1 order by id", campaign_id
    )
    return tuple(Attachment(**dict(row)) for row in rows)


async def listed(conn: PooledConnection, campaign_id: int) -> list[AttachmentInfo]:
    """All of them without their content."""
    rows = await conn.fetch(f"select {_COLUMNS} from attachments where campaign_id = $1 order by id", campaign_id)
    return [AttachmentInfo(**dict(row)) for row in rows]


async def remove(conn: PooledConnection, campaign_id: int, attachment_id: int) -> None:
    """Take one from a draft. Raises NotFound, Conflict once the campaign was started."""
    await _change(conn, campaign_id)
    if await conn.execute("delete from attachments where campaign_id = $1 and id = $2", campaign_id, attachment_id) == "DELETE 0":
        raise NotFound("attachment", attachment_id)


async def _change(conn: PooledConnection, campaign_id: int) -> None:
    if not await conn.fetchval("update campaigns set version = version + 1 where id = $1 and state = 'draft' returning true", campaign_id):
        raise Conflict(f"campaign {campaign_id} was started; only a draft can be changed")

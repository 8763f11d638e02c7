"""What was taken from POP3 and IMAP mailboxes: remembered by the server's identifier and by content, so that nothing counts twice."""

from collections.abc import Sequence

from store.postgres import PooledConnection

KEPT_DAYS = 30  # how long a message that is gone from its mailbox is remembered, should it appear again under another identifier


async def known(conn: PooledConnection, mailbox: str, uids: Sequence[str]) -> set[str]:
    """Those of `uids` that were taken already."""
    rows = await conn.fetch("select uid from mailbox_messages where mailbox = $1 and uid = any($2::text[])", mailbox, uids)
    return {row["uid"] for row in rows}


async def remember(conn: PooledConnection, mailbox: str, uid: str, digest: bytes) -> bool:
    """Note a message in the transaction that keeps it. False: it was taken before, under this identifier or another one."""
    done = await conn.execute(
        "insert into mailbox_messages (mailbox, uid, digest) values ($1, $2, $3) on conflict do nothing", mailbox, uid, digest
    )
    if done == "INSERT 0 0":
        return False
    again = await conn.fetchval(
        "select true from mailbox_messages where mailbox = $1 and digest = $2 and uid <> $3 limit 1", mailbox, digest, uid
    )
    return again is None


async def forget(conn: PooledConnection, mailbox: str, present: Sequence[str]) -> None:
    """Drop what is old and not among the messages that are `present` in the mailbox."""
    await conn.execute(
        "delete from mailbox_messages where mailbox = $1 and taken_at < now() - make_interval(days => $2) and not uid = any($3::text[])",
        mailbox,
        KEPT_DAYS,
        present,
    )

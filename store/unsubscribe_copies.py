"""The copy of each unsubscribe (requirement 97): a direct message to the address that the operator names."""

import msgspec

from store import messages
from store.messages import Part, Target
from store.postgres import PooledConnection

SENDER_DOMAIN = "%sender_domain%"
_SUBJECT = "Unsubscribed: {{ subscriber.address }}"
_TEXT = "{{ subscriber.address }} has left {{ subscriber.list }} (campaign {{ subscriber.campaign }}).\n"


async def send(conn: PooledConnection, user_id: int, campaign_id: int, number: int, email: str, copy_to: str) -> None:
    """Tell `copy_to` that `email`, recipient `number` of a campaign, has left; in the caller's transaction, by the campaign's own way.

    `%sender_domain%` in `copy_to` is the domain that the campaign is from.
    """
    row = await conn.fetchrow(
        "select c.name, c.delivery_server_id, coalesce(l.name, '') as list, coalesce(nullif(s.enforced_from, ''), "
        "(select nullif(p.content->>'from_email', '') from messages m join message_parts p using (part) where m.campaign_id = $1 "
        "and m.first_number <= $2 order by m.first_number desc limit 1), nullif(c.from_email, ''), l.sender_email, '') as sender "
        "from campaigns c join delivery_servers s on s.id = c.delivery_server_id left join lists l on l.id = c.list_id where c.id = $1",
        campaign_id,
        number,
    )
    assert row is not None
    copy_to = copy_to.replace(SENDER_DOMAIN, row["sender"].rpartition("@")[2])
    target = Target(user_id=user_id, delivery_server_id=row["delivery_server_id"], mail_class="transactional", list_id=None)
    part = Part(name="copies of unsubscribes", subject=_SUBJECT, text=_TEXT, from_email=row["sender"] or copy_to)
    said = f"the list {row['list']}" if row["list"] else "all mail of its sender"
    data = {"address": email, "list": said, "campaign": f"{campaign_id} {row['name']}".strip()}
    await messages.add(conn, target, part, {"campaign": str(campaign_id)}, [(copy_to, msgspec.json.encode(data).decode())])

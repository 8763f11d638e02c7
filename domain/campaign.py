"""What a campaign says, Recipient, Batch and totals: what moves from PostgreSQL through Redis to an engine."""

import msgspec


class Attachment(msgspec.Struct, frozen=True, kw_only=True):
    """A file that goes with every message; one with a `content_id` stands in the HTML part as `cid:<content_id>`."""

    filename: str
    content_type: str
    content: bytes
    content_id: str = ""


class CampaignContent(msgspec.Struct, frozen=True, kw_only=True):
    """What one campaign says and to whose name it is said; everything `compose` needs besides the recipient.

    `version` changes whenever any of it does, so a compiled campaign can be kept by (id, version).
    """

    id: int
    version: int
    user_id: int
    list_id: int  # 0: mail to nobody's list, with no way to leave one
    name: str
    subject: str
    from_name: str
    from_email: str
    reply_to: str
    html: str
    text: str
    list_name: str
    list_sender_email: str
    list_sender_name: str
    delivery_server_id: int
    queued_at: float  # POSIX seconds: when it was started; `timeQueued` of its accounting records
    track_links: bool = False  # links of the HTML part lead over the link domain
    track_opens: bool = False  # the HTML part ends with a pixel of the open domain
    utm_source: str = ""  # empty: not added to links
    utm_medium: str = ""
    mail_class: str = "marketing"
    headers: tuple[tuple[str, str], ...] = ()  # custom header fields: name, template of the value
    user_email: str = ""
    user_group_id: int = 0  # 0: the user is in no group
    amp: str = ""  # a template: the AMP part; empty: none
    preheader: str = ""  # a template, hidden at the start of the HTML part
    attachments: tuple[Attachment, ...] = ()
    part: int = 0  # of a message stream: which of the contents that share its id
    raw: bytes = b""  # a whole message in CRLF lines, which goes out as it is; nothing but `from_email` counts besides
    mail_from: str | None = None  # of `raw` that others wrote: its envelope sender, "" for the null one; None: our return path
    sign: bool = True  # with the DKIM keys of its domains


class Recipient(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One numbered recipient of one campaign, with its merge data as it stood when the campaign was started."""

    number: int  # 1..n within the campaign
    subscriber_id: int
    email: str
    data: bytes  # a JSON object: custom field name -> value; decoded only by what needs it


class BatchIdentity(msgspec.Struct, array_like=True, gc=False):
    """Which batch it is: how every packed `Batch` begins."""

    campaign_id: int
    batch: int


class Batch(BatchIdentity, array_like=True, gc=False):
    """Recipients moved together through Redis as one packed value.

    `positions[i]` is the bit of `recipients[i]` in the batch row's progress bitmap.
    """

    attempt: int  # 1 for the first try at these recipients
    delivery_server_id: int
    composed_at: float  # POSIX seconds, fixed when the batch was first announced: the Date of its messages
    first_attempt_at: float  # POSIX seconds, 0.0 on the first attempt
    positions: list[int]
    recipients: list[Recipient]
    part: int = 0  # of a message stream: which content its recipients get


class CampaignTotals(msgspec.Struct, frozen=True, kw_only=True):
    """Progress of one campaign in recipients (`deferrals` and `uncertain` count attempts)."""

    recipients: int = 0
    delivered: int = 0
    bounced: int = 0
    expired: int = 0
    suppressed: int = 0
    cancelled: int = 0
    deferrals: int = 0
    uncertain: int = 0

    @property
    def queued(self) -> int:
        """Recipients without a terminal record."""
        return self.recipients - self.delivered - self.bounced - self.expired - self.suppressed - self.cancelled

"""AccountingRecord: the one record every outcome of an attempt becomes, and the 23 columns PowerMTA users know.

The packed form in the journal is `ext.journal_record`; the table is `accounting`; the files are `journal.accounting_files`.
"""

from typing import Final

import msgspec

# type and order of the default columns of d, b and t records
DEFAULT_COLUMNS: Final = (
    "type", "timeLogged", "timeQueued", "orig", "rcpt", "orcpt", "dsnAction", "dsnStatus", "dsnDiag", "dsnMta", "bounceCat",
    "srcType", "srcMta", "dlvType", "dlvSourceIp", "dlvDestinationIp", "dlvEsmtpAvailable", "dlvSize", "vmta", "jobId",
    "envId", "queue", "vmtaPool",
)  # fmt: skip


class AccountingRecord(msgspec.Struct, kw_only=True, gc=False):
    """One attempt at one recipient and what came of it. Times are POSIX microseconds."""

    kind: str  # one letter, `domain.states.KINDS`
    campaign_id: int
    batch: int
    number: int
    position: int  # bit of this recipient in its batch's progress bitmap
    attempt: int
    epoch: int  # of the lease it was sent under
    connection: int = 0  # which of the engine's connections, 0 = none
    delivery_server_id: int = 0
    at: int
    queued_at: int
    first_attempt_at: int = 0
    due_at: int = 0  # t: when the next attempt is due
    size: int = 0  # octets sent as content (d)
    recipient: str = ""
    sender: str = ""  # MAIL FROM
    status: str = ""  # RFC 3463, `5.1.1`
    diagnostic: str = ""  # the reply, one line, at most 512 bytes
    category: str = ""  # PowerMTA's bounce category
    mta: str = ""  # `mx.example.com (192.0.2.1)`
    source_ip: str = ""
    destination_ip: str = ""
    esmtp: str = ""  # EHLO keywords, joined by commas
    queue: str = ""  # `domain/vmta`


class Intent(msgspec.Struct, kw_only=True, gc=False):
    """Written before the content of a message leaves (R10): without an outcome after a crash it is in doubt."""

    campaign_id: int
    batch: int
    number: int
    position: int
    attempt: int
    epoch: int
    connection: int
    delivery_server_id: int
    at: int

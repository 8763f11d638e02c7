from collections.abc import Callable
from typing import Any, final

from ext.recipient import Names
from ext.template import Program
from ext.token import Signer

@final
class Part:
    field: str
    program: Program
    coding: str
    behind: bytes
    mark: str
    def __init__(self, field: str, program: Program, coding: str, behind: bytes, mark: str) -> None: ...

@final
class Layout:
    refuse: Callable[[str, Exception], Any]
    address: Callable[[str], tuple[bytes, bool]]
    decode: Callable[[bytes], dict[str, Any]]
    decode_value: Callable[[bytes], Any]
    names: Names | None
    constants: dict[str, Any]
    sender: bytes | None
    reply_to: bytes | None
    list_headers: bytes | None
    content_headers: bytes | None
    parts: list[Part] | None
    content_headers_8bit: bytes | None
    parts_8bit: list[Part] | None
    sender_address: bytes | None
    mail_from: bytes | None
    mail_from_domain: bytes | None
    message_domain: bytes | None
    base_url: bytes | None
    subject_line: bytes | None
    unsubscribe_to: bytes | None
    always_utf8: bool
    needs_data: bool
    cfbl: bool
    listless: bool
    custom: list[tuple[bytes, Program]] | None
    user: int
    campaign: int
    subject: Program | None
    from_name: Program | None
    message_signer: Signer | None
    return_signer: Signer | None
    unsubscribe_signer: Signer | None
    unsubscribe_mail_signer: Signer | None
    web_view_signer: Signer | None
    click_signer: Signer | None
    open_signer: Signer | None
    def build(self, recipients: list[Any], date_line: bytes, day: int, clock: dict[str, Any], eight_bit: bool = False) -> list[Any]: ...
    def scope(self, recipient: Any, clock: dict[str, Any]) -> dict[str, Any]: ...

"""The steps of an engine's turn that every message takes, each for a whole group in one call."""

from collections.abc import Callable, Sequence
from typing import Any

from ext.smtp_session import Message, Outcome, SmtpSession

def record_deliveries(outcomes: list[Outcome], append: Callable[[bytes], None], now: int) -> tuple[list[Outcome], int, list[Any]]: ...
def make_messages(built: Sequence[Any], held: object, indexes: list[int], into: list[Message]) -> list[tuple[int, Any]]: ...
def begin(session: SmtpSession, messages: list[Message], append: Callable[[bytes], None], server_id: int, at: int) -> None: ...
def hand_out(
    sessions: list[SmtpSession],
    rooms: list[int],
    messages: list[Message],
    append: Callable[[bytes], None],
    server_id: int,
    at: int,
) -> tuple[list[tuple[SmtpSession, list[Message]]], list[SmtpSession]]: ...
def flush_all(sessions: list[SmtpSession]) -> None: ...
def rooms_of(sessions: list[SmtpSession]) -> tuple[list[int], int]: ...

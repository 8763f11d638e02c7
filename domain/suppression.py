"""Suppression: an address that must not be mailed, for whom, and why. Pure.

A suppression holds for the whole system, for all lists of one user, or for one list of a user. The narrowest is what a
recipient asks for (unsubscribe), the widest what an operator decides.
"""

from typing import Final, Literal

import msgspec

Scope = Literal["system", "user", "list"]
Reason = Literal["manual", "import", "unsubscribed", "bounced", "complained"]

REASONS: Final[tuple[Reason, ...]] = ("manual", "import", "unsubscribed", "bounced", "complained")


class Suppression(msgspec.Struct, frozen=True, kw_only=True):
    """One address under one scope. `user_id` None: the whole system; `list_id` None: all lists of the user."""

    user_id: int | None
    list_id: int | None
    email_key: str
    reason: Reason
    note: str = ""

    @property
    def scope(self) -> Scope:
        """How far it reaches."""
        if self.user_id is None:
            return "system"
        return "user" if self.list_id is None else "list"


def covers(suppression: Suppression, user_id: int, list_id: int) -> bool:
    """Tell whether a suppression of this very address stops mail of `user_id` to `list_id`."""
    return suppression.user_id is None or (suppression.user_id == user_id and suppression.list_id in (None, list_id))


def decide(user_id: int, list_id: int, email_key: str, reason: Reason, note: str = "") -> Suppression:
    """What to suppress when something came back for a recipient of `list_id`.

    An unsubscribe is about the list that was mailed. A refusal for good and a complaint are about the address, whichever
    list it is on; but only for the user who mailed it: nobody's feedback changes another user's sending.
    """
    return Suppression(
        user_id=user_id, list_id=list_id if reason == "unsubscribed" else None, email_key=email_key, reason=reason, note=note
    )

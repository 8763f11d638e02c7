"""Message-IDs read back: which recipient of a campaign a Message-ID belongs to, if we made it.

A Message-ID is `<token@domain>`; the token holds user, campaign and number and is signed (R7), so a receiver's log can be compared with
the ledger without keeping a Message-ID per recipient, and nobody can put a line into that comparison.
"""

from typing import Final

from compose.campaign import MESSAGE_ID_MAC_BYTES
from config.keys import Keyring
from domain.links import varint
from ext.token import Signer

# base32 as tokens are written (RFC 4648 §6 in lower case) to the digits that `int` knows
_DIGITS: Final = bytes.maketrans(b"abcdefghijklmnopqrstuvwxyz234567", b"0123456789abcdefghijklmnopqrstuv")
_NUMBER_BYTES: Final = 5  # a varint of 31 bits


class MessageIds:
    """The Message-IDs of one campaign."""

    def __init__(self, keyring: Keyring, user_id: int, campaign_id: int) -> None:
        self._user_id = user_id
        self._campaign_id = campaign_id
        self._sign = Signer(keyring.derive("message-id"), MESSAGE_ID_MAC_BYTES, base32=True).sign
        # The number begins behind the bits of user and campaign, somewhere inside a character
        bits = 8 * len(varint(user_id) + varint(campaign_id))
        self._first = bits // 5
        self._last = -(-(bits + 8 * _NUMBER_BYTES) // 5)
        self._shift = 5 * self._last - bits - 8 * _NUMBER_BYTES

    def number(self, message_id: str) -> int:
        """The recipient's number; 0 when this is no Message-ID of this campaign. With or without angle brackets."""
        text = message_id.partition("@")[0].lstrip("<")
        try:
            left = int(text[self._first : self._last].encode("ascii").translate(_DIGITS), 32) >> self._shift
        except ValueError:
            return 0
        number = 0
        for at in range(_NUMBER_BYTES):
            octet = left >> 8 * (_NUMBER_BYTES - 1 - at) & 0xFF
            number |= (octet & 0x7F) << 7 * at
            if octet < 0x80:
                break
        # Whatever was read: it is right if and only if signing it gives the same token
        return number if self._sign(self._user_id, self._campaign_id, number) == text else 0

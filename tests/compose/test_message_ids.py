"""compose.message_ids: what a Message-ID says, and that nothing else is taken for one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compose.campaign import MESSAGE_ID_MAC_BYTES
from compose.message_ids import MessageIds
from config.keys import Keyring
from ext.token import Signer

KEYRING = Keyring(b"k" * 32)
sign = Signer(KEYRING.derive("message-id"), MESSAGE_ID_MAC_BYTES, base32=True).sign
ids = st.integers(1, 2**63 - 1)


@given(ids, ids, st.integers(1, 2**31 - 1))
def test_the_number_is_read_back_for_every_user_and_campaign(user: int, campaign: int, number: int):
    token = sign(user, campaign, number)
    for text in (f"<{token}@sender.example>", f"{token}@sender.example", token):
        assert MessageIds(KEYRING, user, campaign).number(text) == number


@given(st.integers(0, 400), ids)
def test_other_campaigns_other_users_and_other_keys_are_not_ours(campaign: int, number: int):
    text = f"<{sign(3, campaign, number)}@sender.example>"
    for other in (MessageIds(KEYRING, 3, campaign + 1), MessageIds(KEYRING, 4, campaign), MessageIds(Keyring(b"l" * 32), 3, campaign)):
        assert other.number(text) == 0


@given(st.text())
def test_anything_else_is_not_ours(text: str):
    assert MessageIds(KEYRING, 1, 1).number(text) == 0


@pytest.mark.parametrize("change", [str.upper, lambda text: text[:-1], lambda text: text + "a", lambda text: "a" + text])
def test_a_changed_message_id_is_not_ours(change):
    assert MessageIds(KEYRING, 1, 1).number(f"<{change(sign(1, 1, 5))}@sender.example>") == 0

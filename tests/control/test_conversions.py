"""Conversions through the API: the postback address, names of parameters, the report; and what every list begins with."""

import pytest

from config.settings import Control, Settings
from tests.control.conftest import MAX_BODY_BYTES, Client
from tests.control.test_campaigns import draft


@pytest.fixture
def settings() -> Settings:
    """Every list begins with two fields."""
    return Settings(control=Control(max_body_bytes=MAX_BODY_BYTES, default_custom_fields=("first_name", "last_name")))


async def test_each_user_has_a_postback_address_and_names_of_his_own(ada: Client, eve: Client) -> None:
    shown = await ada.ok("GET", "/s2s")
    assert shown["postback_url"].startswith("http://127.0.0.1:8080/s/")
    assert shown["postback_url"].endswith("?click_id={click_id}&value={value}&transaction_id={transaction_id}")
    changed = await ada.ok("PUT", "/s2s", json={"parameter": "cid", "value_parameter": "payout", "unit": "$", "channel": "voluum"})
    assert changed["postback_url"].endswith("?cid={click_id}&payout={value}&transaction_id={transaction_id}")
    assert await ada.ok("GET", "/s2s") == changed
    assert (await eve.ok("GET", "/s2s"))["parameter"] == "click_id"
    for wrong in ({"parameter": "a b"}, {"parameter": "unit"}, {"parameter": "v", "value_parameter": "v"}, {"unit": "a\nb"}):
        await ada.refused(422, "PUT", "/s2s", json=wrong)


async def test_a_campaign_reports_its_conversions_to_its_owner(ada: Client, eve: Client) -> None:
    made = await draft(ada, track_conversions=True, track_links=True)
    assert made["track_conversions"] is True
    found = await ada.ok("GET", f"/campaigns/{made['id']}/conversions")
    assert found == {"conversions": 0, "converters": 0, "channels": []}
    await eve.refused(404, "GET", f"/campaigns/{made['id']}/conversions")


async def test_every_new_list_begins_with_the_default_fields(ada: Client) -> None:
    made = await ada.ok("POST", "/lists", json={"name": "fresh"})
    fields = (await ada.ok("GET", f"/lists/{made['id']}/fields"))["items"]
    assert [(each["name"], each["kind"]) for each in fields] == [("first_name", "text"), ("last_name", "text")]

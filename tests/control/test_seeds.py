"""The seed list through the API, and refusals of what was never sent."""

from tests.control.conftest import Client
from tests.control.test_campaigns import draft


async def test_seed_addresses_are_one_users_or_the_systems(ada: Client, eve: Client, admin: Client) -> None:
    mine = await ada.ok("POST", "/seeds", json={"email": "box@test.example"})
    await ada.refused(409, "POST", "/seeds", json={"email": "Box@test.example"})
    await ada.refused(403, "POST", "/seeds", json={"email": "b@test.example", "everybody": True})
    await ada.refused(422, "POST", "/seeds", json={"email": "b at test"})
    ours = await admin.ok("POST", "/seeds", json={"email": "all@test.example", "everybody": True})
    assert [each["email"] for each in (await ada.ok("GET", "/seeds"))["items"]] == ["box@test.example", "all@test.example"]
    assert [each["email"] for each in (await eve.ok("GET", "/seeds"))["items"]] == ["all@test.example"]
    await eve.refused(404, "DELETE", f"/seeds/{mine['id']}")
    await ada.refused(404, "DELETE", f"/seeds/{ours['id']}")
    await ada.ok("DELETE", f"/seeds/{mine['id']}")
    await admin.ok("DELETE", f"/seeds/{ours['id']}")


async def test_a_message_that_was_never_sent_cannot_be_made_again(ada: Client, eve: Client) -> None:
    made = await draft(ada)
    path = f"/campaigns/{made['id']}/recipients"
    await ada.refused(404, "GET", f"{path}/1/message")
    await ada.refused(404, "GET", f"{path}/nobody@a.example/message")
    await eve.refused(404, "GET", f"{path}/1/message")

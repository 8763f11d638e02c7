"""Suppressions through the API."""

from typing import NamedTuple

from engine.suppression_set import SuppressionSet
from store.postgres import Pool
from tests.control.conftest import Client


class Recipient(NamedTuple):
    email: str


async def test_scopes_reach_as_far_as_they_say(ada: Client, eve: Client, admin: Client, pool: Pool) -> None:
    news = await ada.ok("POST", "/lists", json={"name": "news"})
    other = await ada.ok("POST", "/lists", json={"name": "other"})
    await ada.ok("POST", "/suppressions", json={"emails": ["L@news.example"], "scope": "list", "list_id": news["id"], "note": "asked"})
    await ada.ok("POST", "/suppressions", json={"emails": ["u@news.example"]})
    await admin.ok("POST", "/suppressions", json={"emails": ["s@news.example"], "scope": "system", "reason": "complained"})

    async def stops(client: Client, email: str, list_id: int | None = None) -> list[str]:
        query = f"email={email}" + (f"&list_id={list_id}" if list_id else "")
        return [by["scope"] for by in (await client.ok("GET", f"/suppressions/check?{query}"))["by"]]

    assert await stops(ada, "l@NEWS.example", news["id"]) == ["list"]
    assert await stops(ada, "l@news.example", other["id"]) == []
    assert await stops(ada, "l@news.example") == ["list"]
    assert await stops(ada, "u@news.example", other["id"]) == ["user"]
    assert await stops(eve, "u@news.example") == []
    assert await stops(eve, "s@news.example") == ["system"]
    await ada.refused(422, "POST", "/suppressions", json={"emails": ["x@news.example"], "scope": "system"})
    system = next(each for each in (await admin.ok("GET", "/suppressions"))["items"] if each["scope"] == "system")
    await ada.refused(404, "DELETE", f"/suppressions/{system['id']}")
    assert [each["email"] for each in (await ada.ok("GET", f"/suppressions?list_id={news['id']}"))["items"]] == ["l@news.example"]


async def test_adding_is_all_or_none_and_safe_to_repeat(ada: Client, pool: Pool) -> None:
    answer = await ada.refused(422, "POST", "/suppressions", json={"emails": ["a@news.example", "bad"]})
    assert answer["errors"] == [{"field": "emails[1]", "reason": "has no @"}]
    assert (await ada.ok("GET", "/suppressions"))["items"] == []
    body = {"emails": ["a@news.example", "A@NEWS.example", "b@news.example"]}
    assert await ada.ok("POST", "/suppressions", json=body) == {"added": 2, "already_suppressed": 0}
    assert await ada.ok("POST", "/suppressions", json=body) == {"added": 0, "already_suppressed": 2}


async def test_engines_see_additions_and_removals(ada: Client, pool: Pool) -> None:
    engine = SuppressionSet()
    asked = [Recipient("a@news.example")]

    async def stopped() -> list[int]:
        await engine.refresh(pool)
        return engine.among(ada.user_id, 7, asked, [0])

    await ada.ok("POST", "/suppressions", json={"emails": ["a@news.example"]})
    assert await stopped() == [0]
    suppression = (await ada.ok("GET", "/suppressions"))["items"][0]
    await ada.ok("DELETE", f"/suppressions/{suppression['id']}")
    await ada.refused(404, "DELETE", f"/suppressions/{suppression['id']}")
    assert await stopped() == []
    await ada.ok("POST", "/suppressions", json={"emails": ["a@news.example"]})
    assert await stopped() == [0]
    assert engine.among(ada.user_id + 1, 7, asked, [0]) == []

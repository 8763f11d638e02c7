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
    assert answer["errors"] == [{"field": "emails[1]", "reason": answer["errors"][0]["reason"]}]
    assert "neither an address nor a domain" in answer["detail"]
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


async def test_domains_and_local_parts_are_suppressed_checked_and_ended(ada: Client) -> None:
    await ada.ok("POST", "/suppressions", json={"emails": ["bad.example", "*@*.worse.example", "Info@*", "*@bad.example"]})
    found = (await ada.ok("GET", "/suppressions"))["items"]
    assert [each["email"] for each in found] == ["@*.worse.example", "@bad.example", "info@*"]
    assert {each["source"] for each in found} == {"user"}
    for email, by in (
        ("anna@BAD.example", ["@bad.example"]),
        ("anna@sub.bad.example", []),
        ("info@fine.example", ["info@*"]),
        ("bob@a.b.worse.example", ["@*.worse.example"]),
        ("bob@worse.example", []),
    ):
        assert [each["email"] for each in (await ada.ok("GET", f"/suppressions/check?email={email}"))["by"]] == by
    assert await ada.ok("POST", "/suppressions/remove", json={"emails": ["@bad.example", "never@bad.example"]}) == {"removed": 1}
    for wrong in ("in*fo@bad.example", "NOT bad.example", "*", "*@*", "!*@bad.example"):
        answer = await ada.refused(422, "POST", "/suppressions", json={"emails": [wrong]})
        assert answer["errors"][0]["field"] == "emails[0]"


async def test_what_is_exported_can_be_imported_and_runs_in_no_spreadsheet(ada: Client, eve: Client, admin: Client) -> None:
    await ada.ok(
        "POST", "/suppressions", json={"emails": ["=cmd@x.example", "+a@x.example", "plain@x.example", "x.example"], "note": "=1+1"}
    )
    await admin.ok("POST", "/suppressions", json={"emails": ["system@x.example"], "scope": "system"})
    exported = await ada.call("GET", "/suppressions/export")
    assert exported.headers["content-type"].startswith("text/csv")
    lines = exported.text.splitlines()
    assert lines[0] == "address,scope,list_id,source,text,when"
    assert sorted(line.split(",")[0] for line in lines[1:]) == ["'+a@x.example", "'=cmd@x.example", "'@x.example", "plain@x.example"]
    assert {line.split(",")[4] for line in lines[1:]} == {"'=1+1"}
    assert "system@x.example" in (await admin.call("GET", "/suppressions/export")).text
    headers = {"content-type": "text/csv"}
    for suppressed in (4, 0):
        report = await eve.ok("POST", "/suppressions/imports", content=exported.content, headers=headers)
        assert (report["suppressions"], report["refused"], report["suppressed"]) == (4, 0, suppressed)
    kept = {each["email"]: (each["reason"], each["source"], each["note"]) for each in (await eve.ok("GET", "/suppressions"))["items"]}
    assert kept == dict.fromkeys(("@x.example", "+a@x.example", "=cmd@x.example", "plain@x.example"), ("import", "import", "=1+1"))
    assert (await eve.ok("GET", "/suppressions?reason=manual"))["items"] == []
    await ada.refused(422, "POST", "/suppressions/imports?scope=system", content=b"address\n", headers=headers)
    await admin.ok("POST", "/suppressions/imports?scope=system", content=b"email\nall@x.example\n", headers=headers)
    answer = await admin.refused(
        422, "POST", "/suppressions/imports?scope=system", content=b"email,type\nall@x.example,hard\n", headers=headers
    )
    assert answer["errors"][0]["field"] == "type"
    assert [each["source"] for each in (await ada.ok("GET", "/suppressions/check?email=all@x.example"))["by"]] == ["user", "import"]

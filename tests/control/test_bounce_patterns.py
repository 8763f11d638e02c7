"""Bounce patterns through the API."""

from tests.control.conftest import Client

BLOCKED = "550 5.7.1 Unfortunately, messages from [192.0.2.25] weren't sent (S3140)."


async def test_patterns_are_added_moved_listed_tried_and_removed(admin: Client) -> None:
    before = await admin.ok("POST", "/bounce-patterns/test", json={"reply": BLOCKED})
    assert (before["hard"], before["bounce_pattern"]) == (False, None)
    first = await admin.ok("POST", "/bounce-patterns", json={"pattern": "550 5.7.1 Unfortunately, messages from", "verdict": "hard"})
    assert (first["position"], first["verdict"]) == (1, "Hard")
    after = await admin.ok("POST", "/bounce-patterns/test", json={"reply": BLOCKED})
    assert (after["hard"], after["fault"], after["bounce_pattern"]) == (
        True,
        "recipient",
        "550 5.7.1 Unfortunately, messages from==>Hard",
    )
    assert (after["rule"], after["pattern"]) == (before["rule"], before["pattern"])
    second = await admin.ok("POST", "/bounce-patterns", json={"pattern": "/s3\\d{3}/", "verdict": "policy-related|Soft", "position": 1})
    assert [each["id"] for each in await admin.ok("GET", "/bounce-patterns")] == [second["id"], first["id"]]
    assert (await admin.ok("POST", "/bounce-patterns/test", json={"reply": BLOCKED}))["hard"] is False
    tried = await admin.ok("POST", "/bounce-patterns/test", json={"reply": BLOCKED, "line": "weren't sent==>Hard"})
    assert tried["bounce_pattern"] == "weren't sent==>Hard"
    moved = await admin.ok("PATCH", f"/bounce-patterns/{second['id']}", json={"position": 9})
    assert moved["position"] == 2
    assert (await admin.ok("POST", "/bounce-patterns/test", json={"reply": BLOCKED}))["hard"] is True
    await admin.ok("DELETE", f"/bounce-patterns/{first['id']}")
    await admin.refused(404, "DELETE", f"/bounce-patterns/{first['id']}")
    await admin.refused(404, "PATCH", f"/bounce-patterns/{first['id']}", json={"position": 1})
    assert [each["position"] for each in await admin.ok("GET", "/bounce-patterns")] == [1]


async def test_a_file_is_taken_over_whole_or_not_at_all(admin: Client) -> None:
    lines = ["# ours", "", "one text==>Hard", "/two \\d/==>Soft"]
    assert await admin.ok("POST", "/bounce-patterns/import", json={"lines": lines}) == {
        "added": 2, "changed": 0, "removed": 0, "unchanged": 0,
    }  # fmt: skip
    assert (await admin.ok("POST", "/bounce-patterns/import", json={"lines": lines}))["unchanged"] == 2
    answer = await admin.refused(422, "POST", "/bounce-patterns/import", json={"lines": ["new text==>Hard", "/(/==>Hard"], "replace": True})
    assert answer["errors"][0]["field"] == "line 2"
    assert [each["pattern"] for each in await admin.ok("GET", "/bounce-patterns")] == ["one text", "/two \\d/"]


async def test_what_is_wrong_is_refused_with_field_and_reason(admin: Client, ada: Client) -> None:
    good = {"pattern": "some text", "verdict": "Hard"}
    await admin.ok("POST", "/bounce-patterns", json=good)
    await admin.refused(409, "POST", "/bounce-patterns", json=good)
    for change, field in (
        ({"pattern": "/(?<=a)b/"}, "pattern"),
        ({"pattern": "x" * 200_000}, "pattern"),
        ({"verdict": "NOT Hard"}, "verdict"),
        ({"pattern": "other text", "position": 0}, "position"),
        ({"pattern": "other text", "note": "a\nb"}, "note"),
    ):
        answer = await admin.refused(422, "POST", "/bounce-patterns", json={**good, **change})
        assert answer["errors"][0]["field"] == field
    await admin.refused(422, "POST", "/bounce-patterns/test", json={"reply": ""})
    # they are for the whole installation
    await ada.refused(403, "GET", "/bounce-patterns")
    await ada.refused(403, "POST", "/bounce-patterns", json=good)
    await ada.refused(403, "POST", "/bounce-patterns/test", json={"reply": BLOCKED})

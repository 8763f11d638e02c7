"""Results of others through the API: what is suppressed, unsubscribed and marked, once however often the file comes."""

from typing import Any

from store.postgres import Pool
from tests.control.conftest import Client

CSV = {"content-type": "text/csv"}
GENERIC = """address,type,when,text
hard@news.example,hard,2026-11-01 10:00:00+0000,550 5.1.1 unknown
"Soft <soft@news.example>",soft,2026-11-01 10:00:00+0000,452 4.2.2 full
Complains@news.example,complaint,1762000000,
leaves@news.example,unsubscribe,2026-11-02T09:00:00,asked by phone
*@bad.example,suppress,,
no-at,hard,,
x@news.example,maybe,,
y@news.example,hard,yesterday,
*@news.example,hard,,
a,b
"""
POWERMTA = """type,timeLogged,orig,rcpt,bounceCat,dsnStatus,dsnAction,dsnDiag,feedbackType
b,2026-11-01 10:00:00+0000,b@our.example,gone@news.example,bad-mailbox,5.1.1 (bad mailbox),failed,"smtp;550 5.1.1 User unknown",
b,2026-11-01 10:00:00+0000,b@our.example,full@news.example,quota-issues,4.2.2,failed,"smtp;452 4.2.2 Mailbox full",
b,2026-11-01 10:00:00+0000,b@our.example,blocked@news.example,spam-related,5.7.1,failed,"smtp;550 5.7.1 blocked using spamhaus",
rb,2026-11-01 10:00:00+0000,b@our.example,moved@news.example,bad-mailbox,,,,
d,2026-11-01 10:00:00+0000,b@our.example,fine@news.example,,2.0.0,relayed,smtp;250 ok,
t,2026-11-01 10:00:00+0000,b@our.example,later@news.example,,4.7.1,delayed,smtp;451 later,
f,2026-11-01 10:00:00+0000,,angry@news.example,,,,,abuse
f,2026-11-01 10:00:00+0000,,glad@news.example,,,,,not-spam
"""


async def states(pool: Pool) -> dict[str, str]:
    return {row["email"]: row["state"] for row in await pool.fetch("select email, state from subscribers order by email")}


async def reasons(pool: Pool) -> dict[str, tuple[str, bool]]:
    rows = await pool.fetch("select email_key, reason, list_id is not null as on_list from suppressions where removed_at is null")
    return {row["email_key"]: (row["reason"], row["on_list"]) for row in rows}


async def readers(ada: Client, *names: str) -> Any:
    news = await ada.ok("POST", "/lists", json={"name": "news"})
    body = "email\n" + "".join(f"{name}@news.example\n" for name in names)
    await ada.ok("POST", f"/lists/{news['id']}/imports", content=body.encode(), headers=CSV)
    return news


async def test_a_file_suppresses_unsubscribes_marks_and_counts_and_a_second_time_nothing_more(ada: Client, pool: Pool) -> None:
    news = await readers(ada, "hard", "soft", "complains", "leaves", "stays")
    report = await ada.ok("POST", f"/bounces/imports?list_id={news['id']}", content=GENERIC.encode(), headers=CSV)
    refusals = report.pop("refusals")
    assert report == {
        "rows": 10, "hard": 1, "soft": 1, "complaints": 1, "unsubscribes": 1, "suppressions": 1, "skipped": 0, "refused": 5,
        "suppressed": 4, "unsubscribed": 2, "marked_bounced": 1, "soft_counted": 1,
    }  # fmt: skip
    assert [(each["row"], each["field"]) for each in refusals] == [(6, "address"), (7, "type"), (8, "when"), (9, "address"), (10, "")]
    assert await states(pool) == {
        "hard@news.example": "bounced",
        "soft@news.example": "subscribed",
        "complains@news.example": "unsubscribed",
        "leaves@news.example": "unsubscribed",
        "stays@news.example": "subscribed",
    }
    assert await reasons(pool) == {
        "hard@news.example": ("bounced", False),
        "complains@news.example": ("complained", False),
        "leaves@news.example": ("unsubscribed", True),
        "@bad.example": ("import", True),
    }
    again = await ada.ok("POST", f"/bounces/imports?list_id={news['id']}", content=GENERIC.encode(), headers=CSV)
    assert [again[name] for name in ("suppressed", "unsubscribed", "marked_bounced", "soft_counted")] == [0, 0, 0, 0]
    assert await pool.fetchval("select sum(cardinality(bounced_at)) from soft_bounces") == 1


async def test_powermta_s_files_are_read_as_replies_are(ada: Client, pool: Pool) -> None:
    await readers(ada, "gone", "full", "blocked", "moved", "fine", "later", "angry", "glad")
    for expected in ((3, 2, 1), (0, 0, 0)):
        report = await ada.ok("POST", "/bounces/imports", content=POWERMTA.encode(), headers=CSV)
        assert [report[name] for name in ("rows", "hard", "soft", "complaints", "skipped", "refused")] == [8, 2, 2, 1, 3, 0]
        assert (report["suppressed"], report["marked_bounced"], report["unsubscribed"]) == expected
    assert await reasons(pool) == {
        "gone@news.example": ("bounced", False),
        "moved@news.example": ("bounced", False),
        "angry@news.example": ("complained", False),
    }
    changed = {email.partition("@")[0]: state for email, state in (await states(pool)).items() if state != "subscribed"}
    assert changed == {"gone": "bounced", "moved": "bounced", "angry": "unsubscribed"}


async def test_an_operator_s_pattern_decides_for_imported_replies_too(ada: Client, admin: Client, pool: Pool) -> None:
    await admin.ok("POST", "/bounce-patterns", json={"pattern": "mailbox full", "verdict": "Hard"})
    report = await ada.ok("POST", "/bounces/imports", content=POWERMTA.encode(), headers=CSV)
    assert (report["hard"], report["soft"]) == (3, 1)
    assert "full@news.example" in await reasons(pool)


async def test_an_old_result_does_not_undo_the_end_of_a_suppression(ada: Client, pool: Pool) -> None:
    old = b"address,type,when\nback@news.example,hard,2026-01-01 00:00:00+0000\n"
    assert (await ada.ok("POST", "/bounces/imports", content=old, headers=CSV))["suppressed"] == 1
    assert (await ada.ok("POST", "/suppressions/remove", json={"emails": ["Back@news.example"]})) == {"removed": 1}
    await pool.execute("update suppressions set created_at = created_at")
    assert (await ada.ok("POST", "/bounces/imports", content=old, headers=CSV))["suppressed"] == 0
    assert await reasons(pool) == {}
    new = b"address,type\nback@news.example,hard\n"
    assert (await ada.ok("POST", "/bounces/imports", content=new, headers=CSV))["suppressed"] == 1


async def test_what_cannot_be_read_as_a_whole_is_refused_and_changes_nothing(ada: Client, eve: Client, pool: Pool) -> None:
    news = await ada.ok("POST", "/lists", json={"name": "news"})
    for body, said in (
        (b"", "empty"),
        (b"name,age\na,b\n", "no column is named address"),
        (b"address\na@news.example\n", "no column is named type"),
        (b"address;type\na@news.example;hard\n", "commas"),
        (b"\x1f\x8b\x08\x00aaaa", "gzip"),
        (b"\xff\xfea\x00d\x00", "UTF-16"),
    ):
        answer = await ada.refused(422, "POST", "/bounces/imports", content=body, headers=CSV)
        assert said in answer["detail"]
    await ada.refused(415, "POST", "/bounces/imports", content=b"{}", headers={"content-type": "application/json"})
    await eve.refused(404, "POST", f"/bounces/imports?list_id={news['id']}", content=GENERIC.encode(), headers=CSV)
    await eve.refused(404, "POST", f"/suppressions/imports?scope=list&list_id={news['id']}", content=b"address\n", headers=CSV)
    assert await reasons(pool) == {}


async def test_refused_rows_are_listed_up_to_a_thousand_and_all_are_counted(ada: Client) -> None:
    body = "address,type\n" + "bad,hard\n" * 3000 + "good@news.example,hard\n"
    report = await ada.ok("POST", "/bounces/imports", content=body.encode(), headers=CSV)
    assert (report["refused"], len(report["refusals"]), report["suppressed"]) == (3000, 1000, 1)


async def test_one_user_s_results_touch_nobody_else_s_readers(ada: Client, eve: Client, pool: Pool) -> None:
    await readers(ada, "hard", "complains", "leaves")
    await readers(eve, "hard", "complains", "leaves")
    await eve.ok("POST", "/bounces/imports", content=GENERIC.encode(), headers=CSV)
    rows = await pool.fetch("select user_id, state from subscribers where state <> 'subscribed'")
    assert {row["user_id"] for row in rows} == {eve.user_id}
    assert len(rows) == 3

"""Imports through the API: what goes on the list, what is refused, and what a broken file changes."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

from store.postgres import Pool
from tests.control.conftest import Client
from tests.reference.recipients import COUNT, FAULTY, make_recipients

CSV = {"content-type": "text/csv"}
NDJSON = {"content-type": "application/x-ndjson"}


async def make_list(client: Client, name: str = "news") -> str:
    """The path of a new list."""
    return f"/lists/{(await client.ok('POST', '/lists', json={'name': name}))['id']}"


async def subscribers(client: Client, path: str) -> dict[str, dict[str, object]]:
    """Address -> merge data of everybody on a list."""
    page = await client.ok("GET", f"{path}/subscribers?limit=1000")
    return {each["email"]: each["data"] for each in page["items"]}


async def test_a_list_with_faults_keeps_its_good_rows(ada: Client) -> None:
    path = await make_list(ada)
    body = (
        "Email,First_Name,city\r\n"
        "ada@news.example,Ada,London\r\n"
        "nobody,X,Y\r\n"
        '"BOB@B\u00dcCHER.example","Bob\r\nBcc: x@y.example","Z\u00fcrich, CH"\r\n'
        "ADA@news.example,Again,\r\n"
        "eve@news.example,Eve,Paris,too much\r\n"
        "short@news.example\r\n"
        "nul@news.example,N,a\0b\r\n"
        'quote@news.example,"a"b,c\r\n'
        "\r\n"
        "last@news.example,,"
    ).encode()
    report = await ada.ok("POST", f"{path}/imports", content=body, headers=CSV)
    assert (report["state"], report["rows"], report["imported"], report["updated"], report["refused"]) == ("completed", 9, 3, 0, 6)
    assert [(r["row"], r["field"], r["reason"]) for r in report["refusals"]] == [
        (2, "email", "has no @"),
        (4, "email", "is a duplicate of row 1"),
        (5, "", "one column too many: 4 where the header has 3"),
        (6, "", "2 columns too few: 1 where the header has 3"),
        (7, "city", "contains a NUL character"),
        (8, "", "text follows a closing quote; a quote inside a value is written twice"),
    ]
    assert await subscribers(ada, path) == {
        "ada@news.example": {"first_name": "Ada", "city": "London"},
        "BOB@b\u00fccher.example": {"first_name": "Bob\r\nBcc: x@y.example", "city": "Z\u00fcrich, CH"},
        "last@news.example": {"first_name": "", "city": ""},
    }
    assert [field["name"] for field in (await ada.ok("GET", f"{path}/fields"))["items"]] == ["first_name", "city"]
    again = await ada.ok("GET", f"/imports/{report['id']}")
    assert again == report
    rest = await ada.ok("GET", f"/imports/{report['id']}/refusals?after=5&limit=2")
    assert ([each["row"] for each in rest["items"]], rest["next"]) == ([6, 7], 7)


async def test_a_second_import_changes_the_fields_it_names_and_nobodys_wish(ada: Client, pool: Pool) -> None:
    path = await make_list(ada)
    await ada.ok("POST", f"{path}/imports", content=b"email,a,b\nx@news.example,1,2\ny@news.example,3,4\n", headers=CSV)
    await ada.ok("PATCH", f"{path}/subscribers/x@news.example", json={"state": "unsubscribed"})
    report = await ada.ok("POST", f"{path}/imports", content=b"email,b\nX@news.example,9\nz@news.example,5\n", headers=CSV)
    assert (report["imported"], report["updated"]) == (1, 1)
    found = await ada.ok("GET", f"{path}/subscribers/x@NEWS.example")
    assert (found["data"], found["state"]) == ({"a": "1", "b": "9"}, "unsubscribed")


async def test_the_sample_list_is_judged_as_its_description_says(ada: Client, pool: Pool) -> None:
    path = await make_list(ada)
    report = await ada.ok("POST", f"{path}/imports", content=make_recipients(), headers=CSV)
    assert (report["rows"], report["imported"], report["refused"]) == (COUNT, COUNT - len(FAULTY), len(FAULTY))
    assert {each["row"]: each["field"] for each in report["refusals"]} == {row: field for row, (field, _) in FAULTY.items()}


async def test_ndjson_keeps_the_types_of_values(ada: Client) -> None:
    path = await make_list(ada)
    body = (
        b'{"email": "a@news.example", "name": "A", "age": 7, "tags": ["x", "y"], "vip": true, "note": null}\n'
        b"\n"
        b'{"email": "b@news.example", "deep": {"x": 1}}\n'
        b'{"name": "nobody"}\n'
        b"[1]\n"
        b"{bad\n"
        b'{"email": "c@news.example", "Bad Name": "x"}\n'
        b'{"email": "d@news.example", "name": "a\\u0000b"}\n'
        b'{"email": "A@news.example"}'
    )
    report = await ada.ok("POST", f"{path}/imports", content=body, headers=NDJSON)
    assert (report["rows"], report["imported"]) == (8, 1)
    assert [(r["row"], r["field"]) for r in report["refusals"]] == [
        (2, "deep"),
        (3, "email"),
        (4, ""),
        (5, ""),
        (6, ""),
        (7, "name"),
        (8, "email"),
    ]
    data = (await subscribers(ada, path))["a@news.example"]
    assert data == {"name": "A", "age": 7, "tags": ["x", "y"], "vip": True, "note": None}
    kinds = {field["name"]: field["kind"] for field in (await ada.ok("GET", f"{path}/fields"))["items"]}
    assert kinds == {"name": "text", "age": "number", "tags": "list", "vip": "text", "note": "text"}


async def test_fields_of_a_kind_take_only_such_values(ada: Client) -> None:
    path = await make_list(ada)
    for name, kind in (("age", "number"), ("born", "date"), ("tags", "list")):
        await ada.ok("POST", f"{path}/fields", json={"name": name, "kind": kind})
    body = (
        b"email,age,born,tags\n"
        b'a@news.example,7,1990-02-03,"x, y"\n'
        b"b@news.example,seven,,\n"
        b"c@news.example,,03.02.1990,\n"
        b"d@news.example,1e999,,\n"
        b"e@news.example,-1.5,,\n"
    )
    report = await ada.ok("POST", f"{path}/imports", content=body, headers=CSV)
    assert [(r["row"], r["field"]) for r in report["refusals"]] == [(2, "age"), (3, "born"), (4, "age")]
    found = await subscribers(ada, path)
    assert found["a@news.example"] == {"age": 7, "born": "1990-02-03", "tags": ["x", "y"]}
    assert found["e@news.example"]["age"] == -1.5


BROKEN: list[tuple[bytes, str]] = [
    (b"", "the file is empty"),
    (b"\n\n", "the file is empty"),
    (b"name,city\na,b\n", "no column is named email"),
    (b"email;name\na@b.example;x\n", "the columns are separated by ';'"),
    (b"email,name,name\n", "named twice"),
    (b"email,First Name\n", "cannot be a field"),
    (b"email," + b",".join(b"c%d" % i for i in range(1000)) + b"\n", "1001 columns"),
    ("email\na@b.example\n".encode("utf-16"), "UTF-16"),
    ("email\na@b.example\n".encode("utf-16-le"), "UTF-16"),
    (b"email\ra@b.example\rb@b.example\r", "carriage return"),
    (b"PK\x03\x04" + b"x" * 100, "ZIP"),
    (b"\x1f\x8b\x08" + b"x" * 100, "gzip"),
    (b'email,"na\n' + b"x" * 100, "not closed"),
    (b"x" * 3_000_000, "does not end within 1 MiB"),
]


async def test_a_file_that_cannot_be_read_changes_nothing(ada: Client) -> None:
    path = await make_list(ada)
    for body, words in BROKEN:
        answer = await ada.refused(422, "POST", f"{path}/imports", content=body, headers=CSV)
        assert words in answer["detail"], body[:40]
    assert await subscribers(ada, path) == {}
    page = await ada.ok("GET", f"{path}/imports")
    assert [each["state"] for each in page["items"]] == ["failed"] * len(BROKEN)
    assert all(each["failure"] for each in page["items"])
    assert (await ada.ok("GET", f"{path}/fields"))["items"] == []


async def test_what_is_not_rows_is_refused_by_its_type(ada: Client) -> None:
    path = await make_list(ada)
    await ada.refused(415, "POST", f"{path}/imports", content=b"email\n", headers={"content-type": "application/zip"})
    await ada.refused(415, "POST", f"{path}/imports", content=b"email\n")
    await ada.refused(415, "POST", f"{path}/imports", content=b"email\n", headers={**CSV, "content-encoding": "gzip"})


async def test_an_unknown_column_can_be_refused(ada: Client) -> None:
    path = await make_list(ada)
    answer = await ada.refused(422, "POST", f"{path}/imports?create_fields=false", content=b"email,city\n", headers=CSV)
    assert "no field 'city'" in answer["detail"]


async def test_a_byte_order_mark_and_a_missing_last_line_end_are_fine(ada: Client) -> None:
    path = await make_list(ada)
    report = await ada.ok("POST", f"{path}/imports", content="\ufeffemail\na@news.example".encode(), headers=CSV)
    assert (report["imported"], report["refused"]) == (1, 0)


async def test_a_long_stream_with_a_huge_field_keeps_the_rest(ada: Client) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"email,note\na@news.example,1\nb@news.example,"
        for _ in range(80):
            yield b"x" * 100_000
        yield b'\nc@news.example,3\nd@news.example,"open\n'
        for i in range(30_000):
            yield b"f%d@news.example,%d some more text in this row to fill it\n" % (i, i)

    path = await make_list(ada)
    report = await ada.ok("POST", f"{path}/imports", content=body(), headers=CSV)
    assert [(r["row"], r["reason"]) for r in report["refusals"]] == [
        (2, "is longer than 1 MiB"),
        (4, "a value is longer than 128 KiB, or its quotes are not closed"),
    ]
    assert report["imported"] == 30_002


async def test_a_process_that_died_leaves_no_import_running(ada: Client, pool: Pool) -> None:
    path = await make_list(ada)
    list_id = int(path.rpartition("/")[2])
    import_id = await pool.fetchval("insert into imports (user_id, list_id) values ($1, $2) returning id", ada.user_id, list_id)
    found = await ada.ok("GET", f"/imports/{import_id}")
    assert (found["state"], found["failure"]) == ("failed", "the process that ran it ended before the import did")


async def test_the_event_loop_is_not_held_up_by_an_import(ada: Client) -> None:
    path = await make_list(ada)
    body = b"email,a,b,c\n" + b"".join(b"u%d@news.example,x,y,z\n" % i for i in range(20_000))
    importing = asyncio.create_task(ada.ok("POST", f"{path}/imports", content=body, headers=CSV))
    answers = Counter[str]()
    while not importing.done():
        answers[(await ada.ok("GET", "/me"))["scope"]] += 1
    assert (await importing)["imported"] == 20_000
    assert answers["user"] >= 1

"""A list of 3,000 rows with the faults real lists have, and what must be said of each faulty row."""

import csv
import io

COUNT = 3000
HEADER = ["email", "first_name", "last_name", "city", "balance", "favourite"]

FAULTY: dict[int, tuple[str, str]] = {}  # row -> field, kind; filled by make_recipients

_FAULTS = (
    ("no @", "email"),
    ("no domain", "email"),
    ("space", "email"),
    ("double dot", "email"),
    ("long local part", "email"),
    ("empty", "email"),
    ("NUL", "city"),
    ("surplus column", ""),
    ("duplicate", "email"),
    ("line break", None),  # no fault: it is only data
)


def make_recipients() -> bytes:
    """The list as CSV; fills FAULTY."""
    FAULTY.clear()
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(HEADER)
    previous = ""
    for row in range(1, COUNT + 1):
        local, domain = (
            f"{('info', 'a.b', 'first+tag', 'x_y')[row % 4]}{row}",
            ("gmail.example", "b\u00fccher.example", "mail7.example")[row % 3],
        )
        values = [
            f"{local}@{domain}",
            ("Ada", "Bj\u00f6rn", "\u660e", "\u0418\u0433\u043e\u0440\u044c")[row % 4],
            "O'Brien",
            "Austin, TX",
            f"{row / 7:.2f}",
            '"mate"',
        ]
        if row % 41 == 0:
            kind, field = _FAULTS[row // 41 % len(_FAULTS)]
            _spoil(kind, values, local, domain, previous)
            if field is not None:
                FAULTY[row] = (field, kind)
        writer.writerow(values)
        previous = values[0]
    return out.getvalue().encode()


def _spoil(kind: str, values: list[str], local: str, domain: str, previous: str) -> None:
    changes = {
        "no @": f"{local}{domain}",
        "no domain": f"{local}@",
        "space": f"{local} @ {domain}",
        "double dot": f"a..b@{domain}",
        "long local part": f"{'l' * 70}@{domain}",
        "empty": "",
        "duplicate": previous.upper(),
    }
    values[0] = changes.get(kind, values[0])
    if kind == "NUL":
        values[3] = "Nul\0town"
    elif kind == "surplus column":
        values.append("unexpected")
    elif kind == "line break":
        values[1] = "Eve\r\nBcc: victim@other.example"

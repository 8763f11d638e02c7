"""`python -m bench.floor`: runs the floor sender in a process of its own; prints CPU and wall seconds as one JSON object."""

import argparse
import json
import sys

from bench import floor_sender, newsletter
from bench.bench_sink import open_links


def main() -> int:
    """Connect, send a constant copy of the newsletter, say what it cost. Connecting is outside the timed part."""
    parser = argparse.ArgumentParser(prog="bench.floor", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=20)
    parser.add_argument("--messages", type=int, default=100_000)
    parser.add_argument("--window", type=int, default=0, help="0: DATA; else messages per BDAT window")
    chosen = parser.parse_args()
    mail_from, rcpt, wire = newsletter.wire()
    envelope = b"MAIL FROM:<%s>\r\nRCPT TO:<%s>\r\n" % (mail_from, rcpt)
    links = open_links(chosen.port, chosen.connections)
    cpu, wall, sent = floor_sender.run([link.fileno() for link in links], envelope, wire, chosen.messages, chosen.window)
    for link in links:
        link.close()
    print(json.dumps({"messages": sent, "cpu_seconds": cpu, "seconds": wall}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The faults that are played to picked recipients. Rows are those of the fault matrix (docs/delivery-contract.md)."""

from typing import Final

from tests.faults.peers import Fault

HANGS: Final = tuple(Fault(f"hang-{stage}", stage, "hang") for stage in ("rcpt", "data", "body", "dot", "accepted"))  # row 19
LOSSES: Final = tuple(  # rows 20 and 21
    Fault(f"{action}-{stage}", stage, action) for action in ("drop", "reset") for stage in ("rcpt", "data", "body", "dot", "accepted")
)
CLOSING: Final = (  # row 22
    Fault("closing-rcpt", "rcpt", reply="421 4.3.2 Closing"),
    Fault("closing-data", "data", reply="421 4.3.2 Closing"),
    Fault("closing-dot", "dot", reply="421 4.3.2 Closing"),
    Fault("bye-rcpt", "rcpt", "bye"),
    Fault("bye-dot", "dot", "bye"),
)
REFUSALS: Final = (  # row 23
    Fault("refused-rcpt", "rcpt", reply="550 5.1.1 No such mailbox", times=0),
    Fault("refused-data", "data", reply="554 5.7.0 No", times=0),
    Fault("refused-dot", "dot", reply="554 5.6.0 Content refused", times=0),
    Fault("norcpt354", "rcpt", "norcpt354", times=0),
    Fault("wrong-data", "data", "wrong", recipients=105, modes=("data", "lock-step")),
)
DESYNC: Final = (  # row 24
    *(Fault(f"{action}-{stage}", stage, action) for action in ("double", "extra", "garbage", "lf", "wrong") for stage in ("rcpt", "dot")),
    Fault("extra-body", "body", "extra"),
)
ODDITIES: Final = tuple(  # row 25
    Fault(f"{action}-{stage}", stage, action, times=0) for action in ("split", "multi", "short") for stage in ("rcpt", "dot")
)
FLOODS: Final = tuple(  # row 26
    Fault(f"{action}-{stage}", stage, action, picked=2) for action in ("flood", "huge") for stage in ("rcpt", "dot")
)
LATER: Final = (  # row 31
    Fault("defer-rcpt", "rcpt", reply="451 4.3.0 Later", times=2),
    Fault("defer-dot", "dot", reply="451 4.3.0 Later"),
    Fault("too-many", "rcpt", reply="452 4.5.3 Too many recipients"),
    Fault("too-many-552", "rcpt", reply="552 5.5.3 Too many recipients"),
    Fault("quota", "rcpt", reply="552 5.2.2 Mailbox full", times=0),
    Fault("grey", "rcpt", reply="451 4.7.1 Greylisted", times=0, rule={"grey_seconds": 1.5}),
    Fault("code-299", "dot", reply="299 Odd but good", times=0),
)
SLOW: Final = (Fault("slow-rcpt", "rcpt", "slow", rule={"milliseconds": 300}), Fault("slow-dot", "dot", "slow", rule={"milliseconds": 300}))
POLICIES: Final = {"retry": "retry", "assume": "assume_delivered", "fail": "fail"}
DOUBT: Final = tuple(  # R8
    Fault(f"{stage}-{policy}", stage, "drop", times=0, picked=3, limits={"on_uncertain": POLICIES[policy], "max_age_seconds": 2.5})
    for stage in ("dot", "accepted")
    for policy in ("retry", "assume", "fail")
)
ALWAYS: Final = (Fault("always-drops", "rcpt", "drop", times=0, picked=1, limits={"max_age_seconds": 4.0}),)

FAULTS: Final = HANGS + LOSSES + CLOSING + REFUSALS + DESYNC + ODDITIES + FLOODS + LATER + SLOW + DOUBT + ALWAYS

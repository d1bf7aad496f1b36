from __future__ import annotations

import pytest

from dgs.errors import ServerUnavailableError
from dgs.transport import LocalTransport, Method
from tests.helpers.echo import EchoHandler
from tests.helpers.faults import Fault, FaultyTransport, corrupt


def run(plan: dict[int, Fault], count: int) -> tuple[list[bytes | None], list[bytes]]:
    """Make `count` calls; return the replies (None for an error) and what the handler saw."""
    handler = EchoHandler()
    transport = FaultyTransport(LocalTransport(handler), plan)
    replies: list[bytes | None] = []
    for i in range(count):
        try:
            replies.append(transport.call(Method.EXCHANGE, b"%d" % i, timeout_s=1.0))
        except ServerUnavailableError:
            replies.append(None)
    assert transport.calls == count
    return replies, [request for _, request in handler.calls]


@pytest.mark.parametrize(
    ("fault", "replies", "seen"),
    [
        (Fault.DROP_REQUEST, [b"0", None, b"2"], [b"0", b"2"]),
        (Fault.DROP_REPLY, [b"0", None, b"2"], [b"0", b"1", b"2"]),
        (Fault.DUPLICATE, [b"0", b"1", b"2"], [b"0", b"1", b"1", b"2"]),
        (Fault.CORRUPT_REQUEST, [b"0", b"!", b"2"], [b"0", b"!", b"2"]),
        (Fault.CORRUPT_REPLY, [b"0", b"!", b"2"], [b"0", b"1", b"2"]),
        (Fault.DELAY_UNTIL_NEXT, [b"0", None, b"2"], [b"0", b"1", b"2"]),
        (Fault.DELAY_PAST_NEXT, [b"0", None, b"2"], [b"0", b"2", b"1"]),
    ],
)
def test_each_fault_does_what_it_says_to_the_call_it_names(
    fault: Fault, replies: list[bytes | None], seen: list[bytes]
) -> None:
    assert run({1: fault}, 3) == (replies, seen)


def test_a_corrupt_message_differs_in_one_bit() -> None:
    message = bytes(range(50))
    changed = corrupt(message)
    bits = sum((a ^ b).bit_count() for a, b in zip(message, changed, strict=True))
    assert bits == 1
    assert corrupt(b"") != b""

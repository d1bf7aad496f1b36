"""What every transport does alike; each test runs against all of them."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor

import pytest

from dgs import errors
from dgs.errors import DgsError, InternalError, ServerUnavailableError, TooLargeError
from dgs.transport import Method, Transport
from tests.dgs.transport.conftest import Subject
from tests.helpers.echo import SECRET, pattern

MIB = 1 << 20
TIMEOUT_S = 20.0
STREAMED = [method for method in Method if method.streamed]

RAISED_BY_SERVERS = [
    "ConfigError",
    "MalformedError",
    "NonFiniteError",
    "ViewError",
    "ChecksumError",
    "ModelMismatchError",
    "FencedError",
    "WrongRunError",
    "UnknownWorkerError",
    "SequenceError",
    "TooLargeError",
    "NotReadyError",
    "ServerUnavailableError",
    "InternalError",
]
ABSORBED_BY_RETRIES = ("NotReadyError", "ServerUnavailableError")


def test_it_is_a_transport(subject: Subject) -> None:
    assert isinstance(subject.transport, Transport)
    assert subject.transport.address


@pytest.mark.parametrize("method", list(Method))
@pytest.mark.parametrize("request_", [b"", b"x", bytes(range(256))], ids=["empty", "one", "256"])
def test_a_request_arrives_under_its_method_and_the_reply_returns(
    subject: Subject, method: Method, request_: bytes
) -> None:
    assert subject.transport.call(method, request_, timeout_s=TIMEOUT_S) == request_
    assert subject.handler.calls == [(method.value, request_)]


@pytest.mark.parametrize("size", [MIB - 1, MIB, MIB + 1, 5 * MIB])
def test_streamed_messages_of_any_size_arrive_whole(subject: Subject, size: int) -> None:
    request = pattern(size)
    assert subject.transport.call(Method.EXCHANGE, request, timeout_s=TIMEOUT_S) == request
    assert subject.handler.calls == [("Exchange", request)]


@pytest.mark.parametrize("method", STREAMED)
def test_a_small_request_may_have_a_large_reply(subject: Subject, method: Method) -> None:
    reply = subject.transport.call(method, b"reply:%d" % (5 * MIB), timeout_s=TIMEOUT_S)
    assert reply == pattern(5 * MIB)


@pytest.mark.parametrize("method", [Method.JOIN, Method.EXCHANGE])
@pytest.mark.parametrize("name", RAISED_BY_SERVERS)
def test_an_error_of_the_server_is_raised_as_the_same_class_with_its_text(
    subject: Subject, method: Method, name: str
) -> None:
    with pytest.raises(DgsError) as caught:
        subject.transport.call(method, f"raise:{name}".encode(), timeout_s=TIMEOUT_S)
    text = f"{name} of the handler"
    if subject.retrying and name in ABSORBED_BY_RETRIES:
        assert type(caught.value) is ServerUnavailableError
        assert text in str(caught.value)
    else:
        assert type(caught.value) is getattr(errors, name)
        assert str(caught.value) == text


@pytest.mark.parametrize("method", [Method.JOIN, Method.EXCHANGE])
def test_an_unforeseen_exception_shows_only_its_number_and_the_log_has_the_rest(
    subject: Subject, method: Method, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), pytest.raises(InternalError) as caught:
        subject.transport.call(method, b"crash", timeout_s=TIMEOUT_S)
    words, incident = str(caught.value).rsplit(maxsplit=1)
    assert words == "internal error, incident"
    [record] = [r for r in caplog.records if incident in r.getMessage()]
    assert record.name == "dgs.server"
    assert SECRET in caplog.text


def test_the_server_goes_on_after_every_kind_of_failure(subject: Subject) -> None:
    for order in (b"crash", b"raise:MalformedError", b"long-error"):
        with pytest.raises(DgsError):
            subject.transport.call(Method.EXCHANGE, order, timeout_s=TIMEOUT_S)
    assert subject.transport.call(Method.EXCHANGE, b"still here", timeout_s=5.0) == b"still here"


def test_a_very_long_error_text_is_cut_not_lost(subject: Subject) -> None:
    with pytest.raises(errors.MalformedError) as caught:
        subject.transport.call(Method.JOIN, b"long-error", timeout_s=TIMEOUT_S)
    assert str(caught.value).startswith("\u00fc\u00fc\u00fc")
    assert len(str(caught.value)) < 5000


@pytest.mark.parametrize(("method", "limit"), [(Method.JOIN, 100), (Method.EXCHANGE, MIB + 10)])
def test_a_request_above_the_handlers_limit_is_refused_and_at_the_limit_is_not(
    subject: Subject, method: Method, limit: int
) -> None:
    subject.handler.limit_bytes = limit
    assert len(subject.transport.call(method, bytes(limit), timeout_s=TIMEOUT_S)) == limit
    with pytest.raises(TooLargeError, match=str(limit)):
        subject.transport.call(method, bytes(limit + 1), timeout_s=TIMEOUT_S)
    assert len(subject.handler.calls) == 1


def test_traffic_counts_the_bytes_of_requests_and_replies_by_method(subject: Subject) -> None:
    subject.transport.call(Method.EXCHANGE, b"reply:2000000", timeout_s=TIMEOUT_S)
    subject.transport.call(Method.EXCHANGE, bytes(MIB + 7), timeout_s=TIMEOUT_S)
    subject.transport.call(Method.STATUS, b"12345", timeout_s=TIMEOUT_S)
    traffic = subject.transport.traffic
    assert traffic.up_bytes[Method.EXCHANGE] == 13 + MIB + 7
    assert traffic.down_bytes[Method.EXCHANGE] == 2_000_000 + MIB + 7
    assert traffic.up_bytes[Method.STATUS] == traffic.down_bytes[Method.STATUS] == 5
    assert traffic.up_bytes[Method.JOIN] == traffic.down_bytes[Method.JOIN] == 0


def test_calls_of_several_threads_reach_the_handler_one_at_a_time(subject: Subject) -> None:
    requests = [b"%d" % i * (1 + i * 10_000) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        replies = pool.map(
            lambda r: subject.transport.call(Method.EXCHANGE, r, timeout_s=TIMEOUT_S), requests
        )
        assert list(replies) == requests
    assert subject.handler.overlaps == 0
    total = sum(map(len, requests))
    assert subject.transport.traffic.up_bytes[Method.EXCHANGE] == total


def test_after_close_every_call_raises_and_closing_again_is_harmless(subject: Subject) -> None:
    subject.transport.call(Method.STATUS, b"", timeout_s=TIMEOUT_S)
    subject.transport.close()
    subject.transport.close()
    with pytest.raises(ServerUnavailableError, match="closed"):
        subject.transport.call(Method.STATUS, b"", timeout_s=TIMEOUT_S)

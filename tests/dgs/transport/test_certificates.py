"""Files of certificates and tokens: what is refused, and what is said before one ends."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dgs.authority import Authority
from dgs.errors import ConfigError, UnauthenticatedError
from dgs.security import ClientSecurity, ServerSecurity
from dgs.transport.certificates import ExpiryWarning, Identity
from dgs.transport.tokens import TokenBook, bearer, make_token, read_token, token_line

DAY_S = 86400.0
LOG = logging.getLogger("dgs.server")


def test_the_end_of_a_certificate_is_warned_about_a_week_ahead_and_then_daily(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = [0.0]
    warning = ExpiryWarning("the certificate", LOG, lambda: now[0])
    told = []
    for hour in range(24 * 12):
        now[0] = hour * 3600.0
        caplog.clear()
        warning.look(10 * DAY_S)
        if caplog.messages:
            told.append((hour // 24, "has expired" in caplog.text))
    assert told == [(day, day >= 10) for day in range(3, 12)]
    assert "replace" in warning_text(caplog, warning, now)


def warning_text(caplog: pytest.LogCaptureFixture, warning: ExpiryWarning, now: list[float]) -> str:
    now[0] += DAY_S
    warning.look(now[0] + DAY_S)
    return caplog.text


def test_a_key_that_is_another_certificates_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    a, b = authority.issue_worker("a", 1), authority.issue_worker("b", 1)
    with pytest.raises(ConfigError, match="is not the private key of the certificate"):
        Identity.read(str(a.certificate), str(b.key), "")
    with pytest.raises(ConfigError, match="holds no PEM certificate"):
        Identity.read(str(a.key), str(a.key), "")
    with pytest.raises(ConfigError, match="holds no PEM private key"):
        Identity.read(str(a.certificate), str(_private(tmp_path / "x", "text")), "")
    with pytest.raises(ConfigError, match="cannot read the CA certificate"):
        Identity.read("", "", str(tmp_path / "missing"))


def test_secrets_that_everybody_can_read_are_refused(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue_worker("a", 1)
    issued.key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Identity.read(str(issued.certificate), str(issued.key), "")
    token = tmp_path / "token"
    token.write_text(make_token())
    token.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(str(token))


def _private(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


TOKEN = "dgs_" + "a1B2" * 11


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "does not hold one token"),
        ("two words", "does not hold one token"),
        ("short", "does not hold one token"),
        ("nl\u00e9" * 20, "does not hold one token"),
        (token_line("a", "exchange", TOKEN), "is a server's token file"),
    ],
)
def test_what_is_no_token_is_not_sent(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        read_token(str(_private(tmp_path / "token", text)))


@pytest.mark.parametrize(
    "line",
    [
        "a",
        "a exchange",
        "a write sha256:" + "0" * 64,
        "a exchange sha256:" + "0" * 63,
        "exchange sha256:" + "0" * 64,
        TOKEN,
    ],
)
def test_a_wrong_line_of_a_token_file_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# first\n{token_line('b', 'read', make_token())}\n{line}\n")
    with pytest.raises(ConfigError, match="line 3"):
        TokenBook.read(str(path))


def test_a_token_file_without_a_token_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# none yet\n")
    with pytest.raises(ConfigError, match="holds no token"):
        TokenBook.read(str(path))


def test_a_token_file_holds_no_token_and_knows_each_by_its_hash(tmp_path: Path) -> None:
    tokens = {name: make_token() for name in ("a", "two words", "berlin-*")}
    path = tmp_path / "tokens"
    path.write_text("\n".join(token_line(n, "exchange", t) for n, t in tokens.items()))
    assert not any(token in path.read_text() for token in tokens.values())
    book = TokenBook.read(str(path))
    for name, token in tokens.items():
        assert book.caller(bearer(token)).workers == (name,)
        with pytest.raises(UnauthenticatedError):
            book.caller(bearer(token + "x"))
    with pytest.raises(UnauthenticatedError, match="none was sent"):
        book.caller(None)


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        (ServerSecurity, {"tls_cert": "a"}, "tls_cert is given without tls_key"),
        (ServerSecurity, {"tls_key": "a"}, "tls_key is given without tls_cert"),
        (ServerSecurity, {"tls_ca": "a"}, "needs one of its own"),
        (ServerSecurity, {"insecure": 1}, "insecure=1 is not valid"),
        (ServerSecurity, {"token_file": 1}, "token_file=1 is not valid"),
        (ClientSecurity, {"tls_cert": "a"}, "tls_cert is given without tls_key"),
        (ClientSecurity, {"tls_ca": None}, "tls_ca=None is not valid"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    kind: type, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        kind(**settings)


def test_the_environment_says_the_same_as_the_settings() -> None:
    environ = {
        "DGS_TLS_CERT": "cert.pem",
        "DGS_TLS_KEY": "cert.key",
        "DGS_TLS_CA": "ca.pem",
        "DGS_TOKEN_FILE": "token",
    }
    given = {
        "tls_cert": "cert.pem",
        "tls_key": "cert.key",
        "tls_ca": "ca.pem",
        "token_file": "token",
    }
    assert ClientSecurity.from_environment(environ) == ClientSecurity(**given)
    assert ServerSecurity.from_environment(environ) == ServerSecurity(**given)
    assert ClientSecurity.from_environment({}) == ClientSecurity()

"""Certificates that are made here: for whom, how long, and where the keys are."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from dgs.authority import Authority
from dgs.errors import ConfigError


def names(path: Path) -> list[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return [str(name.value) for name in found.value]


def test_certificates_name_hosts_and_workers_and_keys_are_private(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "certs")
    server = authority.issue_server(["ps.example.org", "10.0.0.1", "::1"], 10)
    assert names(server.certificate) == ["ps.example.org", "10.0.0.1", "::1"]
    assert names(authority.issue_worker("berlin-*", 10).certificate) == ["dgs:worker/berlin-*"]
    spaced = authority.issue_worker("two words/x", 10)
    assert names(spaced.certificate) == ["dgs:worker/two%20words%2Fx"]
    assert abs(server.ends - datetime.now(UTC) - timedelta(days=10)) < timedelta(minutes=5)
    keys = list((tmp_path / "certs").glob("*.key"))
    assert len(keys) == 4
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_an_existing_ca_signs_later_certificates_and_nothing_is_overwritten_unasked(
    tmp_path: Path,
) -> None:
    first = Authority(tmp_path)
    issued = first.issue_worker("a", 1)
    before = issued.certificate.read_bytes()
    again = Authority(tmp_path)
    assert first.is_new
    assert not again.is_new
    later = x509.load_pem_x509_certificate(again.issue_worker("b", 1).certificate.read_bytes())
    later.verify_directly_issued_by(x509.load_pem_x509_certificate(first.path.read_bytes()))
    with pytest.raises(ConfigError, match="give --overwrite"):
        again.issue_worker("a", 1)
    assert issued.certificate.read_bytes() == before
    Authority(tmp_path, overwrite=True).issue_worker("a", 1)
    assert issued.certificate.read_bytes() != before
    assert x509.load_pem_x509_certificate(first.path.read_bytes()).subject == later.issuer


def test_half_a_ca_and_another_ones_key_are_refused(tmp_path: Path) -> None:
    Authority(tmp_path / "one")
    Authority(tmp_path / "two")
    (tmp_path / "one" / "ca.key").write_bytes((tmp_path / "two" / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match="is not the key of the certificate"):
        Authority(tmp_path / "one")
    (tmp_path / "one" / "ca.key").unlink()
    with pytest.raises(ConfigError, match="cannot read the CA"):
        Authority(tmp_path / "one")


@pytest.mark.parametrize("host", ["", "a b", "ps.example.org:7070", "h\u00f4te"])
def test_what_is_no_host_is_refused(host: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no host"):
        Authority(tmp_path).issue_server([host], 1)


@pytest.mark.parametrize("worker", ["", " a", "a\x1b[2J", "x" * 129])
def test_what_is_no_name_of_a_worker_is_refused(worker: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no name of a worker"):
        Authority(tmp_path).issue_worker(worker, 1)

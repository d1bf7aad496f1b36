"""A certificate authority for one's own servers and workers, in a folder.

It makes ECDSA P-256 keys and X.509 certificates: one CA, which signs the others; one for the
servers, with their host names and addresses; one per worker, with the URI ``dgs:worker/NAME``.
Keys are files of mode 0600. Nothing is overwritten unless that is said.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dgs.config import is_worker_name
from dgs.errors import ConfigError

__all__ = ["Authority", "Issued"]

_CA_DAYS = 3650
_BACKDATED = timedelta(minutes=5)
"""For clocks that are not quite right."""

_LONGEST_COMMON_NAME = 64


@dataclass(frozen=True)
class Issued:
    """The files of one certificate."""

    certificate: Path
    key: Path
    ends: datetime


class Authority:
    """A CA whose files are in a folder; made there if there is none.

    Args:
        folder: is made if need be; holds ``ca.pem`` and ``ca.key``, and gets what is issued.
        overwrite: replace files that are there, but never the CA's.

    Raises:
        ConfigError: the CA's files are incomplete or damaged, or the folder cannot be written.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        """Read the CA, or make it."""
        self._folder = folder
        self._overwrite = overwrite
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
        self.path = folder / "ca.pem"
        secret = folder / "ca.key"
        self.is_new = not self.path.exists() and not secret.exists()
        if self.is_new:
            self._key, self._certificate = _make_ca()
            _write(secret, _key_pem(self._key), private=True)
            _write(self.path, self._certificate.public_bytes(Encoding.PEM))
        else:
            self._key, self._certificate = _read_ca(self.path, secret)

    def issue_server(self, hosts: Sequence[str], days: float) -> Issued:
        """Make ``server.pem`` and ``server.key``.

        Args:
            hosts: names and IP addresses that clients reach the servers under.
            days: until it ends.

        Raises:
            ConfigError: the files are there, a host is none, or there is none.
        """
        if not hosts:
            raise ConfigError("name at least one host that clients reach the server under")
        names = [_host(h) for h in hosts]
        return self._issue("server", hosts[0], names, ExtendedKeyUsageOID.SERVER_AUTH, days)

    def issue_worker(self, worker: str, days: float) -> Issued:
        """Make ``worker-NAME.pem`` and ``worker-NAME.key``.

        Args:
            worker: name of the worker; one that ends with ``*`` stands for all that begin like it.
            days: until it ends.

        Raises:
            ConfigError: the files are there, or no worker can have this name.
        """
        if not is_worker_name(worker) or worker != worker.strip():
            raise ConfigError(f"{worker!r} is no name of a worker: give printable characters")
        uri = x509.UniformResourceIdentifier("dgs:worker/" + quote(worker, safe="*"))
        name = "worker-" + quote(worker, safe="").replace("%2A", "any")
        return self._issue(name, worker, [uri], ExtendedKeyUsageOID.CLIENT_AUTH, days)

    def _issue(
        self,
        name: str,
        subject: str,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        days: float,
    ) -> Issued:
        certificate, secret = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        there = next((p for p in (certificate, secret) if p.exists()), None)
        if there is not None and not self._overwrite:
            raise ConfigError(f"{there} is there already: give --overwrite to replace it")
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        ends = min(now + timedelta(days=days), self._certificate.not_valid_after_utc)
        made = (
            _builder(subject, key, now, ends)
            .issuer_name(self._certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(_authority_identifier(self._certificate), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        _write(secret, _key_pem(key), private=True)
        _write(certificate, made.public_bytes(Encoding.PEM))
        return Issued(certificate, secret, ends)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(c.isspace() or c in ":/," for c in host):
        raise ConfigError(f"{host!r} is no host: give names and IP addresses, without ports")
    return x509.DNSName(host)


def _make_ca() -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    builder = _builder("dgs CA", key, now, now + timedelta(days=_CA_DAYS))
    certificate = (
        builder.issuer_name(_name("dgs CA"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def _read_ca(path: Path, secret: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        key = load_pem_private_key(secret.read_bytes(), password=None)
    except OSError as error:
        raise ConfigError(f"cannot read the CA: {error.filename}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} and {secret} are not a CA's certificate and key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{secret} is not an ECDSA key: this folder is another program's")
    if key.public_key() != certificate.public_key():
        raise ConfigError(f"{secret} is not the key of the certificate {path}")
    return key, certificate


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common[:_LONGEST_COMMON_NAME])])


def _builder(
    subject: str, key: ec.EllipticCurvePrivateKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(begins, ends) - _BACKDATED)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _authority_identifier(ca: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    found = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write a file whole or not at all; nobody else could read a private one at any time."""
    aside = path.with_name(path.name + ".new")
    aside.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(aside, flags, 0o600 if private else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(aside, path)

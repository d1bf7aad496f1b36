"""Certificates and tokens for tests: right ones, and each kind of wrong one."""

from __future__ import annotations

import os
from pathlib import Path

from dgs.authority import Authority, Issued
from dgs.security import ClientSecurity, ServerSecurity
from dgs.transport.tokens import make_token, token_line

HOSTS = ["127.0.0.1", "localhost"]


class Credentials:
    """A folder with a CA, another CA, and files of both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = Authority(folder / "ca")
        self.other_ca = Authority(folder / "other-ca")
        self.server = self.ca.issue_server(HOSTS, 30)
        self.workers = {name: self.ca.issue_worker(name, 30) for name in ("a", "b", "site-*")}
        self.stranger = self.other_ca.issue_worker("a", 30)
        self.token_file = folder / "tokens"
        self.token_file.write_text("# tokens\n\n")
        self.tokens = {
            "a": self.add_token("a", "exchange"),
            "b": self.add_token("b", "exchange"),
            "viewer": self.add_token("viewer", "read"),
        }
        self.wrong_token = self.write_token("wrong", make_token())

    def elsewhere(self, name: str) -> Authority:
        """Return the same CA, whose next files go to a folder of their own."""
        folder = self.folder / name
        folder.mkdir()
        for file in ("ca.pem", "ca.key"):
            os.link(self.folder / "ca" / file, folder / file)
        return Authority(folder)

    def add_token(self, name: str, role: str) -> Path:
        """Make a token that the server knows; return its file."""
        token = make_token()
        with self.token_file.open("a") as file:
            file.write(token_line(name, role, token) + "\n")
        return self.write_token(f"{name}-{role}", token)

    def write_token(self, name: str, token: str) -> Path:
        """Write a client's token file."""
        path = self.folder / f"{name}.token"
        path.touch(0o600)
        path.write_text(token + "\n")
        return path

    def serving(self, issued: Issued | None = None, *, tokens: bool = False) -> ServerSecurity:
        """Return a server's settings: client certificates are asked for, or tokens."""
        issued = issued or self.server
        return ServerSecurity(
            tls_cert=issued.certificate,
            tls_key=issued.key,
            tls_ca="" if tokens else self.ca.path,
            token_file=self.token_file if tokens else "",
        )

    def showing(self, issued: Issued | None, ca: Path | None = None) -> ClientSecurity:
        """Return a client's settings, with a certificate."""
        ca = ca or self.ca.path
        if issued is None:
            return ClientSecurity(tls_ca=ca)
        return ClientSecurity(tls_ca=ca, tls_cert=issued.certificate, tls_key=issued.key)

    def bearing(self, token: Path) -> ClientSecurity:
        """Return a client's settings, with a token."""
        return ClientSecurity(tls_ca=self.ca.path, token_file=token)

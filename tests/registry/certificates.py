"""Certificates of our own, and tokens signed with them, made by openssl."""

from __future__ import annotations

import base64
import json
import subprocess
import time
from pathlib import Path
from typing import Any


def _openssl(*args: str, data: bytes = b"") -> bytes:
    return subprocess.run(["openssl", *args], input=data, capture_output=True, check=True, timeout=30).stdout


class Authority:
    """A certificate authority in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cert, self.key = folder / "ca.crt", folder / "ca.key"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
        _openssl("req", "-x509", *curve, "-subj", "/CN=tests", "-keyout", str(self.key), "-out", str(self.cert))

    def issue(self, name: str, *names: str) -> tuple[Path, Path]:
        """A certificate and its key for a name, valid for these (`DNS:x`, `IP:…`)."""
        cert, key, extra = self.folder / f"{name}.cert", self.folder / f"{name}.key", self.folder / f"{name}.ext"
        wish = _openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}", "-keyout", str(key))
        extra.write_text(f"subjectAltName={','.join(names)}\n" if names else "extendedKeyUsage=clientAuth\n")
        signed = ("-CA", str(self.cert), "-CAkey", str(self.key), "-CAcreateserial", "-days", "2")
        _openssl("x509", "-req", *signed, "-extfile", str(extra), "-out", str(cert), data=wish)
        return cert, key


def token(cert: Path, key: Path, claims: dict[str, Any]) -> str:
    """A JWT as docker-registry takes it, with the certificate in its header."""

    def encode(data: bytes) -> str:
        return base64.urlsafe_b64encode(data).rstrip(b"=").decode()

    chain = [base64.b64encode(_openssl("x509", "-in", str(cert), "-outform", "DER")).decode()]
    head = encode(json.dumps({"typ": "JWT", "alg": "RS256", "x5c": chain}).encode())
    now = int(time.time())
    body = encode(json.dumps({"exp": now + 300, "nbf": now - 60, "iat": now, "jti": "1", **claims}).encode())
    signature = _openssl("dgst", "-sha256", "-sign", str(key), data=f"{head}.{body}".encode())
    return f"{head}.{body}.{encode(signature)}"

"""The streaming server's TLS: the pair of the configuration, or one that is made for this daemon's life."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import ssl
import tempfile

from wherry.core.errors import FailedPrecondition


async def context(certificate: str, key: str) -> ssl.SSLContext:
    """A server's context. Without a pair a self-signed one is made (as containerd does). Raises FailedPrecondition."""
    if certificate and key:
        return _loaded(certificate, key)
    if certificate or key:
        raise FailedPrecondition("x509_key_pair_streaming: a certificate and its key are needed, or neither")
    openssl = shutil.which("openssl")
    if openssl is None:
        raise FailedPrecondition("enable_tls_streaming needs x509_key_pair_streaming where there is no openssl")
    folder = tempfile.mkdtemp(prefix="wherry-tls-")
    made, private = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    try:
        process = await asyncio.create_subprocess_exec(
            openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "365", "-subj", f"/CN={socket.gethostname()[:60] or 'wherry'}",
            "-addext", f"subjectAltName=DNS:localhost,DNS:{socket.gethostname() or 'localhost'},IP:127.0.0.1,IP:::1",
            "-keyout", private, "-out", made,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        _, said = await process.communicate()
        if process.returncode:
            raise FailedPrecondition(f"openssl made no certificate: {said.decode(errors='replace').strip()}")
        return _loaded(made, private)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _loaded(certificate: str, key: str) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        made.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise FailedPrecondition(f"x509_key_pair_streaming: {certificate}, {key}: {error}") from error
    return made

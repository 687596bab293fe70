"""nftables by libnftables (what the program `nft` is made of), or by the program where the library isn't there.

A text is one transaction: all of it holds, or none. The library saves the start of a program (3 to 4 ms) each time.
libnftables(3), https://wiki.nftables.org
"""

from __future__ import annotations

import ctypes
import json
import subprocess
from typing import Any, Protocol

from wherry.core.errors import FailedPrecondition, NotFound

_SONAME = "libnftables.so.1"
_JSON = 1 << 4  # NFT_CTX_OUTPUT_JSON
# seconds; the kernel waits for packets under way when a table goes
_TIMEOUT = 30.0


class Nft(Protocol):
    """Runs commands of nft."""

    def run(self, text: str) -> None:
        """Raises NotFound where something that the text names isn't there, FailedPrecondition for other refusals."""

    def tables(self) -> list[dict[str, Any]]:
        """The base chains of all tables, as nft's JSON has them."""


def load() -> Nft:
    """Raises FailedPrecondition where there is neither library nor program."""
    try:
        return _Library(ctypes.CDLL(_SONAME))
    except OSError:
        program = _Program()
        program.run("list tables")
        return program


class _Library:
    def __init__(self, library: ctypes.CDLL) -> None:
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = (ctypes.c_uint32,)
        library.nft_ctx_buffer_output.argtypes = (ctypes.c_void_p,)
        library.nft_ctx_buffer_error.argtypes = (ctypes.c_void_p,)
        library.nft_ctx_get_output_buffer.argtypes = (ctypes.c_void_p,)
        library.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        library.nft_ctx_get_error_buffer.argtypes = (ctypes.c_void_p,)
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        library.nft_ctx_output_set_flags.argtypes = (ctypes.c_void_p, ctypes.c_uint)
        library.nft_run_cmd_from_buffer.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
        library.nft_ctx_free.argtypes = (ctypes.c_void_p,)
        self._library = library

    def run(self, text: str) -> None:
        self._run(text, 0)

    def tables(self) -> list[dict[str, Any]]:
        return _chains(self._run("list chains", _JSON))

    def _run(self, text: str, flags: int) -> str:
        # a context for each text: one that is kept grows, and its cache is of no use after somebody else's change
        library = self._library
        context = library.nft_ctx_new(0)
        try:
            library.nft_ctx_output_set_flags(context, flags)
            library.nft_ctx_buffer_output(context)
            library.nft_ctx_buffer_error(context)
            failed = library.nft_run_cmd_from_buffer(context, text.encode())
            output = library.nft_ctx_get_output_buffer(context) or b""
            error = library.nft_ctx_get_error_buffer(context) or b""
        finally:
            library.nft_ctx_free(context)
        if failed:
            raise _refused(error.decode(errors="replace"))
        return bytes(output).decode(errors="replace")


class _Program:
    def run(self, text: str) -> None:
        self._run(["nft", "-f", "-"], text)

    def tables(self) -> list[dict[str, Any]]:
        return _chains(self._run(["nft", "-j", "list", "chains"], ""))

    def _run(self, command: list[str], text: str) -> str:
        try:
            done = subprocess.run(
                command, input=text.encode(), capture_output=True, timeout=_TIMEOUT, check=False, close_fds=True
            )
        except FileNotFoundError:
            raise FailedPrecondition(
                "neither libnftables nor the program nft is there (Debian: apt-get install nftables)"
            ) from None
        if done.returncode:
            raise _refused(done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="replace")


def _refused(text: str) -> NotFound | FailedPrecondition:
    first = next((line for line in text.splitlines() if line.strip()), "no reason given")
    if "No such file or directory" in first:
        return NotFound(f"nftables: {first}")
    return FailedPrecondition(f"nftables: {first}")


def _chains(text: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(text or "{}").get("nftables", [])
    except ValueError:
        return []
    return [item["chain"] for item in found if "chain" in item and "hook" in item["chain"]]

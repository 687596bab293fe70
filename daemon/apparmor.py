"""The default AppArmor profile, loaded into the kernel where the host has AppArmor (`core/apparmor.py`)."""

from __future__ import annotations

import asyncio
import os
import shutil

import structlog

from wherry.core import apparmor, places

log = structlog.get_logger(__name__)

# seconds: the parser compiles a few lines
_TIMEOUT = 20.0
_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


async def provide(parser: str = "") -> None:
    """Load the profile, unless it is loaded since the host started; what is in the way is logged, never raised.

    Root of a user's namespace may not: profiles are the host's.

    `parser` is the program that does it (apparmor_parser(8)), else it is looked for.
    """
    if os.geteuid() or os.environ.get(places.INSIDE) or not apparmor.enabled() or apparmor.loaded():
        return
    program = parser or shutil.which("apparmor_parser", path=_PATH)
    if program is None:
        log.warning("containers run without an AppArmor profile: apparmor_parser is missing (Debian: apparmor)")
        return
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        program, "--replace", "--skip-cache", stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe
    )
    try:
        async with asyncio.timeout(_TIMEOUT):
            _, said = await process.communicate(apparmor.PROFILE.encode())
    except TimeoutError:
        process.kill()
        await process.wait()
        said = b"no answer"
    if process.returncode:
        log.warning(
            "the default AppArmor profile can't be loaded, containers run without one",
            profile=apparmor.NAME,
            error=said.decode(errors="replace").strip(),
        )
    else:
        log.info("AppArmor profile loaded", profile=apparmor.NAME)

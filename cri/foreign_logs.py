"""Logs of containers in somebody else's shims, which `wherry.cri.log_program` writes.

binary:///PATH/TO/python?-Ic=from wherry.cri.log_program import main; main(PATH)
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import Final
from urllib.parse import quote

from wherry.core.errors import DeadlineExceeded

# seconds that the program may take to see that its file was moved away, and between looks whether it has
_REOPEN: Final = 10.0
_LOOK: Final = 0.05


def uri(path: str) -> str:
    """What a task's stdout says, so that its shim writes the log by this program."""
    code = f"from wherry.cri.log_program import main; main({path!r})"
    return f"binary://{sys.executable}?-Ic={quote(code, safe='')}"


async def reopened(path: str) -> None:
    """Wait until there is a file under the log's name again. Raises DeadlineExceeded."""
    end = time.monotonic() + _REOPEN
    while not os.path.exists(path):  # noqa: ASYNC240 -- a look at one name
        if time.monotonic() > end:
            raise DeadlineExceeded(f"log {path}: its writer made no new file: deadline exceeded")
        await asyncio.sleep(_LOOK)

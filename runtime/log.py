"""Messages as runc's callers parse them: `--log FILE --log-format json`, or text on stderr.

containerd reads the last JSON line with level `error` out of the file; conmon and dockerd do likewise.
"""

from __future__ import annotations

import os
import sys


class Log:
    """Where messages go. path "": stderr."""

    def __init__(self, path: str = "", *, as_json: bool = False, debug: bool = False) -> None:
        self.path = path
        self.as_json = as_json
        self.debug_enabled = debug

    def write(self, level: str, message: str) -> None:
        """One line, unless it is of level `debug` and nobody asked for those. An error also goes to stderr when the
        log is a file: a person may be there."""
        if level == "debug" and not self.debug_enabled:
            return
        import json  # noqa: PLC0415 - most commands say nothing
        import time  # noqa: PLC0415

        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self.as_json:
            line = json.dumps({"level": level, "msg": message, "time": now})
        else:
            line = f'time="{now}" level={level} msg={json.dumps(message, ensure_ascii=False)}'
        data = (line + "\n").encode("utf-8", "surrogateescape")
        if not self.path:
            os.write(2, data)
            return
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        if level == "error":
            sys.stderr.write(message + "\n")
            sys.stderr.flush()

    def warn(self, message: str) -> None:
        self.write("warning", message)

    def error(self, message: str) -> None:
        self.write("error", message)

"""The daemon's log: structlog on stderr, as text on a terminal and JSON elsewhere, unless the configuration says."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

# containerd's names for levels, which flags and configuration use
LEVELS = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
    "fatal": logging.CRITICAL,
    "panic": logging.CRITICAL,
}


_debug = False


def is_debug() -> bool:
    """Whether debug lines are written: for places that are passed too often to build a line that nobody gets."""
    return _debug


def set_up(level: str = "", form: str = "") -> None:
    """Configure logging once. `level` is one of LEVELS, empty: info; `form` "text", "json" or empty."""
    global _debug  # noqa: PLW0603 -- one log for one process
    _debug = LEVELS.get(level or "info", logging.INFO) <= logging.DEBUG
    text = form == "text" or (not form and sys.stderr.isatty())
    renderer: Any
    if text:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        exceptions: list[Any] = []
    else:
        renderer = structlog.processors.JSONRenderer()
        exceptions = [structlog.processors.format_exc_info]
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
            *exceptions,
            structlog.processors.EventRenamer("msg") if not text else _same,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS.get(level or "info", logging.INFO)),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        # the level may change while the daemon runs (SIGHUP), so loggers ask each time
        cache_logger_on_first_use=False,
    )
    # gRPC, asyncio and aiohttp log by the standard library
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


def _same(logger: Any, name: str, event: Any) -> Any:
    return event


def set_level(level: str) -> None:
    """Change the level of a daemon that runs; empty: info."""
    global _debug  # noqa: PLW0603
    _debug = LEVELS.get(level or "info", logging.INFO) <= logging.DEBUG
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(LEVELS.get(level or "info", logging.INFO)))

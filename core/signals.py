"""`signal` without the enumerations that it makes of its numbers when it is loaded, for the command line.

The same functions and constants; a signal is an `int`, and `signal.signal` gives plain numbers for SIG_DFL and SIG_IGN.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
else:
    import _signal as signal

__all__ = ["signal"]

"""What holds for all tests."""

from __future__ import annotations

import signal

# A shell that starts the tests in the background has SIGINT and SIGQUIT ignored, and what the tests start would inherit
# that: runtimes hand ignored signals on to the container.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

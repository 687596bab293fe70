"""Exec, attach and port-forward of the CRI: a server on loopback whose addresses are given out once.

tokens.py              the addresses
server.py, front.py    HTTP: WebSockets are aiohttp's, SPDY's upgrade is ours
spdy*.py, carrier.py   SPDY/3.1
remote.py, remote_*.py exec and attach: `channel.k8s.io` in its versions 1 to 5
ports.py, ports_*.py   port-forward
processes.py           what they stream from and to
"""

from __future__ import annotations

from wherry.cri.streaming.server import Streaming

__all__ = ["Streaming"]

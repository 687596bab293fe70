"""ttrpc, the RPC between a daemon and its shims (and between `wherry` and `wherryd`).

`frames` parses and encodes without I/O and knows the life of a stream; `server` and `client` drive it with asyncio,
`blocking` with a plain socket and without importing asyncio; `sockets` binds and connects unix sockets.
The protocol is the containerd project's ttrpc 1.2.
"""

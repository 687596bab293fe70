"""gRPC over HTTP/2, spoken by ourselves: a server and a client, for unix sockets and asyncio."""

"""The servers in a pod: TCP and UDP echo, and HTTP with one large body known to the byte.

One process per pod. It is started inside the pod's namespace with a socket of its parent's: it does nothing until
the parent has written it down and says so, and ends if the parent dies first; then it says that it listens.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import socket
import sys
from typing import cast

from calitrace.lab.topology import ECHO_PORT, HTTP_PORT, UDP_PORT

RECORDED, LISTENING = b"r", b"l"
BODY_BYTES = 10_000_000
_MOST_HEADERS = 64


def body() -> bytes:
    """What GET /10MB returns: 10,000,000 bytes, always the same, without a pattern that could hide a mix-up."""
    return hashlib.shake_256(b"calitrace").digest(BODY_BYTES)


class _UdpEcho(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        self._transport.sendto(data, addr)


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        return  # a probe may end with a reset
    finally:
        writer.close()


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        request = (await reader.readline()).split()
        for _ in range(_MOST_HEADERS):
            if await reader.readline() in (b"\r\n", b"\n", b""):
                break
        method, path = [*request, b"", b""][:2]
        status, answer = b"404 Not Found", b"try /10MB\n"
        if method not in (b"GET", b"HEAD"):
            status, answer = b"405 Method Not Allowed", b"GET or HEAD\n"
        elif path == b"/10MB":
            status, answer = b"200 OK", body()
        elif path == b"/":
            status, answer = b"200 OK", b"calitrace lab\n"
        head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, len(answer))
        writer.write(head + (b"" if method == b"HEAD" else answer))
        await writer.drain()
    except (ConnectionError, ValueError):  # ValueError: a line longer than the reader's limit
        return
    finally:
        writer.close()


async def serve(parent: socket.socket) -> None:
    """Listen, tell *parent*, and serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    echo = await asyncio.start_server(_echo, "0.0.0.0", ECHO_PORT)
    http = await asyncio.start_server(_http, "0.0.0.0", HTTP_PORT)
    udp, _ = await loop.create_datagram_endpoint(_UdpEcho, local_addr=("0.0.0.0", UDP_PORT))
    parent.send(LISTENING)
    parent.close()
    await stop.wait()
    udp.close()
    for server in (echo, http):
        server.close()


def main() -> None:
    """Command line: the number of the inherited socket."""
    with socket.socket(fileno=int(sys.argv[1])) as parent:
        if parent.recv(1) == RECORDED:
            asyncio.run(serve(parent))


if __name__ == "__main__":
    main()

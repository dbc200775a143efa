"""Connections that are bounded in number, time and bytes until their request is complete.

uvicorn bounds the size of headers and the time between requests, not how long a client takes to send one, nor how many
connections are open: each is a file descriptor, and once these have run out, no client gets in. What uvicorn calls
`limit_concurrency` refuses the next request, whoever sends it. Here the connection that has been silent for longest
makes room.
"""

import asyncio
from dataclasses import dataclass

from uvicorn.protocols.http.h11_impl import H11Protocol  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True)
class Bounds:
    """Bounds on connections.

    Attributes:
        connections: Most connections that wait for their client: for a request, or until it has read its answer.
        seconds: Seconds for a whole request, and for reading an answer.
        bytes: Bytes that are read of a request, discarded ones included.
    """

    connections: int = 128
    seconds: float = 30.0
    bytes: int = 2 * 1024 * 1024


def bounded(bounds: Bounds) -> type[H11Protocol]:
    """The protocol of uvicorn with bounds on all connections of one server."""

    class Bounded(H11Protocol):
        received = 0  # bytes of the current request
        unsent: float = float("inf")  # bytes of an answer at the last look

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.look()

        def data_received(self, data: bytes) -> None:
            self.received += len(data)
            if self.received > bounds.bytes:
                self.transport.abort()
                return
            super().data_received(data)
            self.look()

        def on_response_complete(self) -> None:
            self.received = 0
            super().on_response_complete()  # may begin with a request that had been sent before
            self.look()

        def connection_lost(self, exc: Exception | None) -> None:
            self.forget()
            super().connection_lost(exc)

        def look(self) -> None:
            """Starts the time of the client, or ends it if it is our turn."""
            cycle = self.cycle
            if cycle is not None and not cycle.more_body and not cycle.response_complete:
                self.forget()
            elif self not in waiting:
                self.start()
                if len(waiting) > bounds.connections:
                    next(iter(waiting)).drop()

        def start(self) -> None:
            waiting[self] = self.loop.call_later(bounds.seconds, self.expire)

        def expire(self) -> None:
            del waiting[self]
            unsent = self.transport.get_write_buffer_size()
            if 0 < unsent < self.unsent:  # the client is reading its answer, slowly
                self.unsent = unsent
                self.start()
            else:
                self.transport.abort()

        def drop(self) -> None:
            self.forget()
            self.transport.abort()

        def forget(self) -> None:
            if (timer := waiting.pop(self, None)) is not None:
                timer.cancel()

    waiting: dict[Bounded, asyncio.TimerHandle] = {}  # for their clients, those that have waited longest first
    return Bounded

"""Refusals before the application sees a request: other hosts, missing tokens, and bodies that are too large.

A page of another website can make its own name mean this machine (DNS rebinding): the browser then takes the server for
a part of that website. Its requests have that name as their host. Browsers send JSON to another website only if that
website agrees, so anything but JSON is refused as well.
"""

import hmac
import ipaddress
import json
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from lora_compose.compose.support.network import is_local

MOST_BYTES = 64 * 1024
"""Bytes of a body; the longest valid request has fewer, even with every letter escaped."""

_DISCARDED = 1024 * 1024  # bytes of a refused body that are read, so that its sender comes to read the answer

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """The address of a server, and its conditions for requests.

    Attributes:
        hosts: Further names that it is called by.
        token: What every request must carry; None is nothing.
    """

    host: str = "localhost"
    hosts: tuple[str, ...] = ()
    token: str | None = None

    def knows(self, host: str) -> bool:
        """Whether a Host header names this server: localhost, the address, or one of the further names.

        If it listens on all addresses, each is known; a name that is rebound is none.
        """
        match = re.fullmatch(r"\[([0-9a-f:.]+)\](:\d+)?|([^:\[\]]+)(:\d+)?", host.lower())
        if match is None:
            return False
        name = match[1] or match[3]
        if is_local(name) or name in {known.lower() for known in (self.host, *self.hosts)}:
            return True
        return _is_address(name) and _is_address(self.host) and ipaddress.ip_address(self.host).is_unspecified

    def admits(self, authorization: str) -> bool:
        """Whether an Authorization header has the token."""
        given = authorization.encode("latin-1", "replace")
        return self.token is None or hmac.compare_digest(given, f"Bearer {self.token}".encode())


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class Door:
    """Middleware that answers what is refused, and hands on requests whose body, of `most` bytes, it has read."""

    def __init__(self, app: Callable[..., Awaitable[None]], access: Access, most: int = MOST_BYTES) -> None:
        self._app, self._access, self._most = app, access, most

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is None:
            body = await self._body(receive)
            if isinstance(body, bytes):
                await self._app(scope, _after(body, receive), send)
                return
            if body is None:  # the client is gone
                return
            refused = body
        await _answer(*refused, receive, send)

    def _refused(self, scope: Mapping[str, Any]) -> tuple[int, str] | None:
        """Status and reason of a refusal, by the headers."""
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value.decode("latin-1"))

        def single(name: bytes) -> str:
            values = headers.get(name, [""])
            return values[0] if len(values) == 1 else ""

        if not self._access.knows(single(b"host")):
            return 421, "the server is not known by this host; --allowed-host of lora-compose serve adds a name"
        if not self._access.admits(single(b"authorization")):
            return 401, "the server needs its token: send the header Authorization: Bearer TOKEN"
        if (
            scope["method"] == "POST"
            and single(b"content-type").partition(";")[0].strip().lower() != "application/json"
        ):
            return 415, "send JSON, with the header Content-Type: application/json"
        length = single(b"content-length")
        return self._too_large() if length.isdecimal() and int(length[:20]) > self._most else None

    def _too_large(self) -> tuple[int, str]:
        return 413, f"the request is too large; at most {self._most} bytes"

    async def _body(self, receive: Receive) -> bytes | tuple[int, str] | None:
        """The body; or a refusal, or None if the client has gone."""
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._most:
                return self._too_large()
            if not message.get("more_body", False):
                return bytes(body)


def _after(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what follows it."""
    rest = [body]

    async def given() -> Message:
        return {"type": "http.request", "body": rest.pop(), "more_body": False} if rest else await receive()

    return given


async def _answer(status: int, reason: str, receive: Receive, send: Send) -> None:
    """Answers at once. The connection is closed when the client has sent a bounded rest of its request."""
    body = json.dumps({"detail": reason}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    left, more = _DISCARDED, True
    while more and left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        more = message.get("more_body", False)
    await send({"type": "http.response.body", "body": b"", "more_body": False})

"""Connects to a Ray cluster: one of this machine, one that this machine is a node of, or another one by Ray Client."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray  # pyright: ignore[reportMissingImports]
from ray._private import ray_constants  # pyright: ignore[reportMissingImports]
from ray.exceptions import RayError  # pyright: ignore[reportMissingImports]

LOCAL, LOOPBACK, CLIENT = "local", "127.0.0.1", "ray://"
SECONDS_TO_ANSWER = 10.0

# How HTTP/2, and so gRPC, begins on both sides (RFC 9113, 3.4): its preface, then a frame of settings.
_SETTINGS = b"\x04"
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + _SETTINGS + bytes(5)

_TOKEN = (
    "If the cluster asks for a token, this machine needs the same one: RAY_AUTH_MODE=token, and the token in "
    "RAY_AUTH_TOKEN, in a file that RAY_AUTH_TOKEN_PATH names, or in ~/.ray/auth_token. Ray must be of the same version"
)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A cluster by its address ("local" starts one); one that is there stays open. OSError if it refuses."""
    ours = not ray.is_initialized()
    if ours:
        _check_reachable(address)
        try:
            _connect(address)
        except (RayError, ConnectionError) as error:
            ray.shutdown()
            raise ConnectionError(f"the Ray cluster at {address} refused the connection ({error}). {_TOKEN}") from error
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        with _on_loopback():
            ray.init(address, _node_ip_address=LOOPBACK, include_dashboard=False, **quiet)
    else:
        ray.init(address, **quiet)


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Inside this block a cluster that is started listens on this machine alone.

    Ray takes the address of a network for 127.0.0.1, so that other nodes can join, unless it is told that there are
    none; it has an environment variable for that, which is read when ray is imported.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_reachable(address: str) -> None:
    """Raises OSError if no gRPC server answers at HOST:PORT, which Ray itself would try for many minutes."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not port.isdecimal():
        return
    try:
        with socket.create_connection((host, int(port)), timeout=SECONDS_TO_ANSWER) as connection:
            if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):  # otherwise it waits for a handshake with keys
                connection.sendall(_HELLO)
                if connection.recv(4)[3:] != _SETTINGS:
                    raise OSError("what answers there is no Ray cluster")
    except OSError as error:
        how = "`ray start --head` starts one and prints its address"
        if address.startswith(CLIENT):
            how += "; Ray Client listens on port 10001 of the head node"
        raise ConnectionError(f"there is no Ray cluster at {address}: {error.strerror or error}; {how}") from error

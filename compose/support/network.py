"""Network addresses."""

import ipaddress


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def url_of(host: str, port: int) -> str:
    """The URL of a server."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

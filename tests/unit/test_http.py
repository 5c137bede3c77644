"""The HTTP side's port: taken at whatever address the option names, or refused with what to do."""

import contextlib
import socket

import pytest

from cache_server.http import AddressError, HttpSide
from tools import lacking


@pytest.fixture
def _ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        lacking(f"no IPv6 here: {error}")


def reached(address: str, host: str) -> bool:
    """Whether somebody who asks `host` gets to a side that listens at `address`."""
    with contextlib.closing(HttpSide(address)) as side, contextlib.suppress(OSError):
        socket.create_connection((host, side.port), timeout=5).close()
        return True
    return False


def test_it_listens_where_it_is_told() -> None:
    assert reached("127.0.0.1:0", "127.0.0.1")
    assert reached("0.0.0.0:0", "127.0.0.1")
    assert reached("localhost:0", "127.0.0.1")


@pytest.mark.usefixtures("_ipv6")
@pytest.mark.parametrize("address", ["[::1]:0", "::1:0"])
def test_an_address_of_ipv6_is_one_too(address: str) -> None:
    assert reached(address, "::1")
    assert not reached(address, "127.0.0.1")


@pytest.mark.usefixtures("_ipv6")
def test_any_address_is_any_of_both_families() -> None:
    assert reached("[::]:0", "::1")
    assert reached("[::]:0", "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1", "192.0.2.1"])
def test_an_address_that_can_not_be_had_is_named(host: str) -> None:
    with contextlib.closing(HttpSide("127.0.0.1:0")) as taken:
        address = f"{host}:{taken.port}"
        with pytest.raises(AddressError, match=rf"http = '{address}': .+: choose another --http, or off"):
            HttpSide(address)

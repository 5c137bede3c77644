"""What the server's loop makes of frames: exactly one reply for each message, whatever happens inside."""

import contextlib
from collections.abc import Iterator

import pytest

from cache_server import config as configuration
from cache_server import runtime
from cache_server.clock import monotonic_ms
from cache_server.orders import Orders, StoppedEarlyError
from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from cache_server.protocol.keys import owner_of
from cache_server.protocol.messages import Code
from cache_server.protocol.presence import ARENA, SOCKET
from cache_server.server import FILES_MS, Ending, Server
from cache_server.vitals import Vitals
from contract.frames import hostile_frames
from contract.samples import REQUESTS
from processes import short_dir

PING = encode(m.Ping(id=5))


@contextlib.contextmanager
def begun(orders: Orders) -> Iterator[Server]:
    """One that does not run: its loop's steps are called."""
    with short_dir() as directory:
        flags = {"dir": str(directory), "capacity": "16MiB", "http": "off"}
        config = configuration.parse(configuration.gather(flags, {}, None))
        access = runtime.Access(None)
        runtime.prepare(directory)
        with runtime.sole_server(directory, access), contextlib.ExitStack() as open_things:
            vitals = open_things.enter_context(contextlib.closing(Vitals(config)))
            yield open_things.enter_context(contextlib.closing(Server(config, access, vitals, orders)))


@pytest.fixture
def server() -> Iterator[Server]:
    with begun(Orders()) as server:
        yield server


def refusal(reply: m.Reply) -> str:
    assert isinstance(reply, m.Refused), reply
    return reply.code


@pytest.mark.parametrize("frames", [[], [b"", PING], [PING, PING], [b""] * 50])
def test_any_number_of_frames_but_one_is_malformed(server: Server, frames: list[bytes]):
    reply = server._reply_to(frames)
    assert refusal(reply) == Code.MALFORMED
    assert f"{len(frames)} frames" in reply.detail


@pytest.mark.parametrize("name", hostile_frames())
def test_a_hostile_frame_is_refused_and_counted(server: Server, name: str):
    reply = server._reply_to([hostile_frames()[name]])
    assert refusal(reply) in (Code.MALFORMED, Code.TOO_LARGE, Code.UNKNOWN_OP)
    assert len(encode(reply)) < 2_000, "a refusal is short, whatever it refuses"
    assert server.service.counters.refused == {reply.code: 1}
    assert server.service.counters.latency["invalid"].count == 1


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: type(request).__name__)
def test_every_op_has_a_reply_with_its_id_and_the_boot(server: Server, request_: m.Request):
    reply = server._reply_to([encode(request_)])
    assert (reply.id, reply.boot) == (request_.id, server.boot)
    assert server.service.counters.served == 1


def test_an_internal_error_is_a_refusal_and_the_loop_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
):
    def broken(_: str) -> bool:
        raise ZeroDivisionError

    server.service._is_locked = broken
    register = m.Register(
        id=78,
        version_min=1,
        version_max=1,
        engine="e",
        role="scheduler",
        namespace=b"n",
        proof=f"{owner_of('e').hex()}.1",
    )
    for _ in range(30):
        reply = server._reply_to([encode(register)])
        assert (refusal(reply), reply.id, reply.boot) == (Code.INTERNAL, 78, server.boot)
        assert "ZeroDivisionError" in reply.detail
    assert len(caplog.records) == 20, "a stack trace for each of the first ones only"
    assert isinstance(server._reply_to([PING]), m.Pong)


def test_an_admin_token_is_wanted_for_everything(server: Server):
    assert refusal(server._reply_to([encode(m.Clear(id=1, token="guess"))])) == Code.DENIED
    assert isinstance(server._reply_to([encode(m.Clear(id=1, token=server.service.identity.token))]), m.Done)


def test_who_is_told_to_stop_before_it_serves_takes_over_nothing():
    orders = Orders()
    orders.stop()
    with pytest.raises(StoppedEarlyError), begun(orders):
        pytest.fail("it serves")


@pytest.mark.parametrize("removed", [SOCKET, ARENA])
def test_a_server_whose_files_are_removed_begins_anew_but_not_when_it_was_told_to_stop(removed: str):
    for stops, ending in ((0, Ending.RESTART), (1, Ending.STOPPED)):
        with begun(Orders()) as server:
            assert server._tick(monotonic_ms()) is None
            (server.config.runtime_dir / removed).unlink()
            server.orders.stops = stops
            assert server._tick(monotonic_ms() + FILES_MS) is ending


def test_a_pause_outlives_the_server_that_was_told():
    orders = Orders()
    with begun(orders) as server:
        orders.pause_until_ms = monotonic_ms() + 60_000
        assert server.paused
    with begun(orders) as server:
        assert server.paused
        assert server.published.paused

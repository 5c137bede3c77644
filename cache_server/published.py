"""What the main loop tells the other threads: an immutable object, replaced as a whole.  Pure."""

import msgspec

from cache_server.endpoints import Endpoints
from cache_server.report import Status


class Published(msgspec.Struct, frozen=True):
    boot: int = 0
    turned: bool = False  # the loop has turned once: the start is over
    draining: bool = False
    paused: bool = False
    stopped: bool = False
    status: Status | None = None
    endpoints: Endpoints | None = None


NOTHING = Published()  # before there is a server

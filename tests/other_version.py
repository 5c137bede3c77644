"""A cache server of another version: of the protocol, or of the arena's format.

usage: other_version.py protocol|format ARGUMENT ...        (the arguments are cache-server's)
"""

import sys

from cache_server.protocol import messages, slots


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "protocol":
        messages.VERSION_MIN = messages.VERSION_MAX = messages.VERSION_MAX + 1
    else:
        slots.FORMAT_VERSION += 1
    from cache_server.cli import main as run

    run(arguments)


if __name__ == "__main__":
    main()

"""`python -m cache_server` is the command `cache-server`."""

from cache_server.cli import main

main()

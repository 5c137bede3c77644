"""The engine's side: what vLLM's processes use to talk to the cache server and to do without it."""

__version__ = "0.1.0"

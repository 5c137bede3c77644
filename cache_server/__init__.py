"""The cache server: a daemon that keeps KV-cache chunks in shared memory for the engines of one host."""

__version__ = "0.1.0"

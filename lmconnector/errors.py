"""What may go wrong on the engine's side.  Nothing of it reaches vLLM: a failure of the cache is a miss."""

ONE_USER = "run engine and server as one user, or give the server a `group` that both are in"  # the advice


class CacheError(Exception):
    """The root of them all; one that gets as far as a hook of vLLM's, `bridge.guarded` counts as a miss."""


class ConfigError(CacheError, ValueError):
    """An option is wrong; raised at start, before anything runs."""


class VersionError(CacheError):
    """This vLLM's contract with connectors is not one we know; raised at start, before anything runs."""


class UnsupportedError(CacheError):
    """This model's KV cache can't be cached correctly; the engine serves without the cache."""


class UnavailableError(CacheError):
    """No answer within the deadline, or no connection."""


class StaleError(CacheError):
    """The slot no longer holds what the server had promised."""


class RegistrationError(CacheError):
    """The server does not know our KV caches; the message says why not."""

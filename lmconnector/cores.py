"""The cores that this process may use.

vLLM binds the thread that computes on a CPU to some of them, and the threads which that one makes inherit it.
Ours are to run beside it: vLLM leaves a core free for connectors.
"""

import contextlib
import os

ALLOWED = os.sched_getaffinity(0)  # at import: vLLM has bound nothing yet


def spread() -> None:
    """The calling thread may run on all of them."""
    with contextlib.suppress(OSError):  # they have been taken from us since: what is left will do
        os.sched_setaffinity(0, ALLOWED)

"""Threads of ours run beside the one that vLLM binds to a core."""

import os
import threading

import pytest

from lmconnector import cores


def test_a_thread_that_inherits_one_core_gets_all_of_them_back() -> None:
    if len(cores.ALLOWED) < 2:
        pytest.skip("this process has one core")
    seen: list[set[int]] = []

    def work() -> None:
        seen.append(os.sched_getaffinity(0))
        cores.spread()
        seen.append(os.sched_getaffinity(0))

    def bound() -> None:
        os.sched_setaffinity(0, {min(cores.ALLOWED)})
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    thread = threading.Thread(target=bound)
    thread.start()
    thread.join()
    assert seen == [{min(cores.ALLOWED)}, cores.ALLOWED]

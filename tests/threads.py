"""Threads that race each other, switched between as often as Python allows."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator

HASTE_S = 1e-6


@contextlib.contextmanager
def hasty() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(HASTE_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def race(count: int, work: Callable[[int], object]) -> None:
    """All at once; an error of any of them is raised here."""
    barrier = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  it is raised in the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def hammered(work: Callable[[], None], count: int = 4) -> Iterator[None]:
    """By so many threads, meanwhile."""
    ended = threading.Event()
    errors: list[BaseException] = []

    def hammer() -> None:
        try:
            while not ended.is_set():
                work()
        except BaseException as error:  # noqa: BLE001  it is raised in the test
            errors.append(error)

    threads = [threading.Thread(target=hammer) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]

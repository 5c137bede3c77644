"""Takes the pictures in docs/ of the status page: `PYTHONPATH=.:tests python -m health.screenshots docs`."""

import os
import random
import sys
import threading
import time
from pathlib import Path

from cache_server.session import Session
from health.browser import Browser, browser
from health.probed import probed
from processes import eventually

CHUNK = 256 << 10
OPTIONS = ("--capacity", "64MiB", "--silent-after", "4s", "--late-after", "500ms", "--stall-after", "3s")
PICTURES = {
    "status-page.png": (1100, 1380, "light"),
    "status-page-dark.png": (1100, 1380, "dark"),
    "status-page-phone.png": (360, 1380, "light"),
}


class Traffic:
    """Engines that store and load, until told to stop."""

    def __init__(self, runtime_dir: Path) -> None:
        self._random = random.Random(7)
        self._stop = threading.Event()
        self._engines = [Session(runtime_dir, f"vllm-{name}", CHUNK) for name in ("a", "b")]
        self._threads = [
            threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(2)
        ]
        for thread in self._threads:
            thread.start()

    def _work(self, number: int) -> None:
        engine, known = self._engines[number], 0
        while not self._stop.wait(0.05):
            wanted = self._random.randrange(max(1, known), known + 4)
            hashes = [bytes([number, each % 256]) * 16 for each in range(wanted)]
            found = len(engine.load(hashes))
            if found < wanted and known < 60:
                engine.store(
                    hashes[found:], [os.urandom(64)] * (wanted - found), b"".join(hashes[found - 1 : found])
                )
                known = wanted
            engine.ping()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def take(window: Browser, directory: Path) -> None:
    for name, (width, height, scheme) in PICTURES.items():
        window.window(width, height, scheme)
        time.sleep(1)
        window.shoot(directory / name)


def main(directory: Path) -> None:
    with probed(*OPTIONS) as server, browser() as window:
        window.window(1200, 1000)
        window.open(f"http://{server.address}/")
        silent = Session(server.process.runtime_dir, "vllm-c", CHUNK)
        silent.reserve(16)
        silent.ping()
        traffic = Traffic(server.process.runtime_dir)
        time.sleep(10)
        server.fault("loop", "busy 1")
        time.sleep(10)
        eventually(lambda: "degraded" in window.text("state"), "a silent engine", 30)
        time.sleep(20)
        take(window, directory)
        traffic.stop()
        assert not window.messages, window.messages


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""A hundred thousand good requests to a real server: its memory, descriptors and threads stay the same."""

import os

import pytest

from bench.soak import CAPACITY, REQUESTS, growth, soak
from processes import eventually, server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(280)]

GROWTH_MAX_KIB = 4 << 10
FDS_MAX = 8  # that come and go with connections


def test_a_hundred_thousand_good_requests(capsys: pytest.CaptureFixture[str]) -> None:
    with server("--log-level", "error", "--capacity", CAPACITY) as process:
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        samples = list(soak(process.runtime_dir, process.pid, REQUESTS))
        with capsys.disabled():
            print(f"\nsoak: {samples[len(samples) // 4]} -> {samples[-1]}")
        grown = growth(samples)
        assert grown.rss_anon_kib < GROWTH_MAX_KIB
        assert grown.fds <= FDS_MAX
        assert grown.threads == 0
        assert process.log.read_text() == ""
        eventually(
            lambda: len(os.listdir(f"/proc/{process.pid}/fd")) <= files + FDS_MAX, "the connections' end"
        )
        status = process.check_conservation()
        assert sum(status.refused.values()) == 0

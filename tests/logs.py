"""What a test reads of the log."""

import logging

import pytest


def told_by(caplog: pytest.LogCaptureFixture, log: logging.Logger) -> list[str]:
    """A thread that an earlier test has left may still say something, by another logger."""
    return [record.getMessage() for record in caplog.records if record.name == log.name]

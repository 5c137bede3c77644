"""The health of a vLLM with the connector, read from vLLM's log.  Pure.

(EngineCore pid=41) WARNING 11-21 10:38:32 [heartbeat.py:186] health: healthy -> degraded why="..." ...
"""

import re

from lmconnector.demo.timeline import STATES, Change

CHANGE = re.compile(r'\bhealth: \w+ -> (\w+) why="([^"]*)"')
PROCESS = re.compile(r"\((\w+ pid=\d+)\)")
DECORATION = re.compile(
    r"^(\(\w+ pid=\d+\)\s*)*((DEBUG|INFO|WARNING|ERROR)\s+\d\d-\d\d \d\d:\d\d:\d\d\s+)?(\[[\w./]+:\d+\]\s*)?"
)


def read_change(line: str, at_s: float) -> Change | None:
    found = CHANGE.search(line)
    if found is None or found[1] not in STATES:
        return None
    process = PROCESS.search(line)
    return Change(at_s, process[1] if process else "", found[1], found[2])


def plain(line: str) -> str:
    """What the line says, without who said it and when."""
    return DECORATION.sub("", line.strip()).strip()

"""Which checks are made, in which order, and what becomes of those behind one that failed."""

import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from cache_server.protocol.presence import LOCKS
from lmconnector.doctor.examination import OF_THE_ARENA, OF_THE_SERVER, of_the_server
from lmconnector.doctor.findings import Finding, Verdict
from peer import Answer, peer


def refuser(*answered: type[m.Request]) -> Answer:
    """A server with a bug in all but what is `answered`."""

    def answer(request: m.Request) -> bytes:
        if isinstance(request, answered):
            return encode(
                m.Pong(id=request.id, boot=1, seq=0, known=False, state="ready", progress=0, silence_ms=0)
            )
        return encode(m.Refused(id=request.id, boot=1, code="INTERNAL", detail="see the server's log"))

    return answer


@pytest.mark.parametrize(
    ("answered", "failed"), [((), ["server"]), ((m.Ping,), ["engines", "arena space", "protocol"])]
)
def test_a_refusal_is_a_finding_that_sends_to_the_servers_log(
    answered: tuple[type[m.Request], ...], failed: list[str]
) -> None:
    with peer(refuser(*answered)) as path:
        (path / LOCKS).mkdir()
        findings: dict[str, Finding] = {each.check: each for each in of_the_server(path, has_torch=False)}
    assert list(findings) == ["runtime dir", "socket", *OF_THE_SERVER, *OF_THE_ARENA]
    assert [check for check, each in findings.items() if each.verdict is Verdict.FAIL] == failed
    for check in failed:
        assert "was refused: INTERNAL: see the server's log" in findings[check].found
        assert findings[check].advice == "look at the server's log"

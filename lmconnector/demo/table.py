"""The table at the end: what a request cost, by the state of the cache server.  Pure."""

from lmconnector.demo.timeline import Phase, Request, Run, typical_ms, worst_ms

SERVER = {
    Phase.ABSENT: "none yet",
    Phase.UP: "up",
    Phase.AT_KILL: "killed while it ran",
    Phase.DEAD: "dead",
    Phase.BACK: "restarted",
}
HEAD = (
    f"{'':22}{'':17}{'':>9}{'':>8}   time to first token",
    f"{'cache server':22}{'prompt':17}{'requests':>9}{'failed':>8}{'median':>11}{'worst':>11}",
)


def table(run: Run) -> list[str]:
    lines = list(HEAD)
    for phase, server in SERVER.items():
        for hit, prompt in ((False, "computed"), (True, "from the cache")):
            requests = [each for each in run.requests if run.phase(each) is phase and each.hit is hit]
            if requests:
                lines.append(_row(server, prompt, requests))
    return lines


def _row(server: str, prompt: str, requests: list[Request]) -> str:
    answered = [request for request in requests if not request.error]
    failed = len(requests) - len(answered)
    times = (
        f"{typical_ms(answered):>8.0f} ms{worst_ms(answered):>8.0f} ms" if answered else f"{'-':>11}{'-':>11}"
    )
    return f"{server:22}{prompt:17}{len(requests):>9}{failed:>8}{times}"

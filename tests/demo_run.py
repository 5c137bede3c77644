"""A run of the demo in which everything went well, to be spoilt by tests."""

from lmconnector.demo.timeline import Change, Marks, Request, Run

DOCUMENTS = 2
ANSWERS = {0: (5, 6), 1: (7, 8)}


def request(
    document: int,
    start_s: float,
    end_s: float,
    *,
    cached: int = 0,
    tokens: tuple[int, ...] | None = None,
    ttft_ms: float | None = None,
    error: str = "",
) -> Request:
    default_ms = 50.0 if cached else 500.0
    return Request(
        document=document,
        start_s=start_s,
        end_s=end_s,
        ttft_ms=0.0 if error else default_ms if ttft_ms is None else ttft_ms,
        prompt_tokens=0 if error else 600,
        cached_tokens=cached,
        tokens=() if error else ANSWERS.get(document, ()) if tokens is None else tokens,
        error=error,
    )


def change(at_s: float, state: str, process: str = "EngineCore pid=2", why: str = "because") -> Change:
    return Change(at_s, process, state, why)


def a_run(
    *,
    requests: list[Request] | None = None,
    changes: list[Change] | None = None,
    started_s: float | None = 10.0,
    killed_s: float | None = 20.0,
    restarted_s: float | None = 30.0,
    restored_chunks: int = 4,
    took_s: float = 70.0,
    unfinished: str = "",
) -> Run:
    if requests is None:
        requests = [
            *(request(each, each, each + 1) for each in range(DOCUMENTS)),  # no server
            *(request(each, 10 + each, 11 + each) for each in range(DOCUMENTS)),  # stored
            *(request(each, 12 + each, 12.1 + each, cached=512) for each in range(DOCUMENTS)),
            request(0, 19.99, 20.6),  # while the server is killed
            *(request(each, 21 + each, 22 + each) for each in range(DOCUMENTS)),  # no server
            request(1, 30, 31),  # not noticed yet
            *(request(each, 32 + each, 32.1 + each, cached=512) for each in range(DOCUMENTS)),
        ]
    if changes is None:
        changes = [
            change(0, "degraded"),
            change(10.5, "recovering"),
            change(10.6, "healthy"),
            change(20.01, "degraded", why="connection closed"),
            change(30.3, "recovering"),
            change(30.4, "healthy", why="registered"),
        ]
    return Run(
        machine="vLLM 1.2 <on> & two cores",
        documents=DOCUMENTS,
        document_tokens=512,
        chunk_tokens=256,
        answer_tokens=2,
        marks=Marks(started_s=started_s, killed_s=killed_s, restarted_s=restarted_s),
        requests=requests,
        changes=changes,
        restored_chunks=restored_chunks,
        took_s=took_s,
        unfinished=unfinished,
    )

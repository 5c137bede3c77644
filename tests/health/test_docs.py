"""docs/health.md says what the code does: states, codes, fields, options, metrics, bounds, traps."""

import re
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cache_server.beats import Motion
from cache_server.config import KEYS, PATHS
from cache_server.counters import Histogram
from cache_server.detection import Detection, detection
from cache_server.health import TRANSITIONS, Code, State
from cache_server.job import Job
from cache_server.report import Latency
from cache_server.trials import STAGES, Result
from cache_server.vital_metrics import CATALOGUE, PREFIX, VitalMetrics
from cache_server.workers import WorkerState
from health.world import World, world_of
from kit import Peer
from lmconnector.timing import Timing

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "health.md").read_text()
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
OWN_KEYS = [
    *PATHS, "http", "starting_status", "late_after", "stall_after", "work_age", "pause_limit", "canary_idle",
    "canary_deadline", "canary_fail_after", "canary_job", "required_engines", "required_count",
]  # fmt: skip


def section(title: str) -> str:
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def named(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", text))


def first_cells(text: str) -> set[str]:
    return {name for line in text.splitlines() if line.startswith("|") for name in named(line.split("|")[1])}


def test_states_codes_motions_and_results_are_all_there() -> None:
    assert {state.value for state in State} <= first_cells(section("States"))
    codes = {value for name, value in vars(Code).items() if name.isupper()}
    assert codes <= first_cells(section("States"))
    assert {motion.value for motion in Motion} <= first_cells(section("Who says it"))
    assert {result.value for result in Result} <= named(section("The canary"))
    assert {state.value for state in WorkerState} <= first_cells(section("Endpoints"))
    assert all(stage in section("The canary") for stage in STAGES)
    assert all(f"`{stage}`" in RUNBOOK for stage in STAGES)
    assert all(f"`{code}`" in RUNBOOK for code in codes - {"ok", "stopped"})
    assert len(TRANSITIONS) == len(State)


def test_options_and_their_defaults_are_those_of_the_code() -> None:
    rows = [line.split("|") for line in section("Options").splitlines() if line.startswith("| `")]
    said: dict[str, str] = {}
    for row in rows:
        keys, defaults = re.findall(r"`([^`]+)`", row[1]), re.findall(r"`([^`]+)`", row[2]) or [""]
        assert len(keys) == len(defaults), row
        said.update(zip(keys, defaults, strict=True))
    assert said == {name: KEYS[name].default for name in OWN_KEYS}
    assert set(Job.__struct_fields__) <= first_cells(section("The canary"))


def scraped(world: World) -> set[str]:
    latency = Latency(tuple(Histogram().counts), 0)
    vital = VitalMetrics(world.answering._facts(world.now_ms), latency, 0, {"live": Histogram()})
    registry = CollectorRegistry(auto_describe=False)
    registry.register(vital)
    text = generate_latest(registry).decode()
    return {family.name.removeprefix(PREFIX) for family in text_string_to_metric_families(text)}


def test_the_catalogue_is_what_can_be_scraped_and_what_is_written() -> None:
    with world_of() as world:
        world.started()
        assert scraped(world) == set(CATALOGUE)
    written = {name.removesuffix("_total") for name in first_cells(section("Metrics"))}
    assert written == set(CATALOGUE)


def test_every_field_of_the_answers_is_written() -> None:
    with world_of(canary_idle="off") as world:
        Peer(world.service_world).start()
        world.started()
        with world.pulses["loop"].busy("x", 1_000, lambda: world.now_ms):
            everything = world.get("/health")[1]
        waiting = world.ask("/health?deep=1")
        world.run(1_000)
        assert waiting is not None
        everything["canary"] = world.get("/health")[1]["canary"]
        events = world.get("/health/events")[1]
    words = named(section("Endpoints"))
    assert set(everything) | set(events) <= words
    for rows in ("components", "engines", "workers", "tiers"):
        assert set(everything[rows][0]) <= words, rows
    assert set(everything["components"][0]["leases"][0]) <= words
    assert set(everything["canary"]) | set(everything["canary"]["last"]) <= words
    assert set(events["events"][0]) <= words


def test_the_default_bounds_are_as_written() -> None:
    with world_of() as world:
        bounds = detection(world.config)
    rows = section("Bounds")
    for name, words in {
        "loop_still_unready_ms": "2.1 s",
        "loop_still_dead_ms": "10.1 s",
        "process_stopped_unready_ms": "2.2 s",
        "process_stopped_dead_ms": "10.2 s",
        "path_broken_ms": "18 s",
        "path_mended_ms": "4.1 s",
        "worker_silent_ms": "5.8 s",
        "memory_ms": "0.8 s",
    }.items():
        assert words in rows
        assert getattr(bounds, name) == float(words.split()[0]) * 1_000, name
    assert set(Detection.__struct_fields__) >= {"thread_dead_ms", "draining_ms", "paused_ms"}
    watchdog_ms = bounds.process_stopped_dead_ms
    for words, ms in (
        ("10.2 s for a process that is stopped", watchdog_ms),
        ("20.3 s for a", bounds.loop_still_dead_ms + watchdog_ms),
        ("2.6 s with the defaults", Timing().hang_found_within_ms),
    ):
        assert words in rows
        assert ms == float(words.split()[0]) * 1_000, words


def test_every_trap_has_its_test() -> None:
    rows = [line.split("|") for line in section("Traps").splitlines() if re.match(r"\| \d", line)]
    assert [int(row[1].split()[0]) for row in rows] == list(range(1, 31))
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        tests, number = named(row[2]), int(row[1].split()[0])
        assert any(test.startswith(f"test_trap_{number:02}_") for test in tests), row
        for test in tests:
            exists = (ROOT / "tests" / test).exists() if "/" in test else f"def {test}(" in sources
            assert exists, test
            assert not test.startswith("test_trap_") or test.startswith(f"test_trap_{number:02}_"), row
    written = {name for name in named(section("Traps")) if name.startswith("test_trap_")}
    assert written == set(re.findall(r"def (test_trap_\w+)\(", sources))

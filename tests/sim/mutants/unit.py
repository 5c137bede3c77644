"""One planted bug under ordinary tests: `python -m sim.mutants.unit BUG TEST…` fails if a test finds it."""

import sys

import pytest

import engine_side  # noqa: F401  what unit tests stand on, before the bug takes its place there
import kit  # noqa: F401
from sim.mutants.planting import mutants

# No world has shown these within 3,000 schedules: it takes two rare things at once.  Which test does.
SEEN_BY = {
    "LeavesLaterHashesBehind": "test_scheduler.py",
    "StoresWithoutAParent": "test_scheduler.py",
    "LooksAtTheHashOnly": "test_scheduler.py",
    "HoardsSlots": "test_stock.py",
    "WritesWithoutAReservation": "test_worker.py",
    "WritesIntoAnyArena": "test_worker.py",
    "CommitsForAnybody": "test_storage.py",
    "ReusesGenerations": "test_storage.py",
    "EvictsTheLeased": "test_storage.py",
    "LeasesNothing": "test_leases.py",
}


def main() -> int:
    name, *tests = sys.argv[1:]
    mutant = next(mutant for mutant in mutants() if mutant.name == name)
    called = mutant.base.__name__
    for module in list(sys.modules.values()):
        if vars(module).get(called) is mutant.base and not module.__name__.startswith("sim.mutants"):
            setattr(module, called, mutant.bug)
    return pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests])


if __name__ == "__main__":
    sys.exit(main())

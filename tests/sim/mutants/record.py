"""`make mutants`: after how many schedules is each planted bug caught?  Written to mutants.json."""

import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from sim.mutants.planting import AREAS, Mutant, mutants
from sim.mutants.unit import SEEN_BY

RECORD = Path(__file__).with_name("mutants.json")
DOCS = Path(__file__).parents[3] / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants: written by `make mutants` -->", "<!-- mutants end -->"
SEEDS_MAX = int(os.environ.get("SIM_MUTANT_SEEDS", "3000"))
COMPLAINT_CHARACTERS = 100


def search(name: str) -> tuple[str, int, str]:
    """-> the mutant, the schedules that it took, the complaint; no complaint: it survives"""
    mutant = next(mutant for mutant in mutants() if mutant.name == name)
    for seed in range(SEEDS_MAX):
        if found := mutant.complaint(seed):
            return name, seed + 1, found[:COMPLAINT_CHARACTERS]
    return name, SEEDS_MAX, ""


def load() -> dict[str, dict[str, object]]:
    return json.loads(RECORD.read_text())


def entry(mutant: Mutant, schedules: int, complaint: str) -> dict[str, object]:
    return {"area": mutant.area, "seed": schedules - 1, "schedules": schedules, "complaint": complaint}


def table(record: dict[str, dict[str, object]]) -> str:
    """For the docs, by area."""
    lines = ["| area | planted | caught by the first schedule | within 10 | within 100 | most schedules |"]
    lines.append("|---|---|---|---|---|---|")
    for area in AREAS:
        took = {name: int(entry["schedules"]) for name, entry in record.items() if entry["area"] == area}
        within = [sum(count <= most for count in took.values()) for most in (1, 10, 100)]
        worst = max(took, key=lambda name: took[name])
        cells = [area, len(took), *within, f"{took[worst]} (`{worst}`)"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write(record: dict[str, dict[str, object]]) -> None:
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    text = DOCS.read_text()
    before, after = text.partition(BEGIN)[0], text.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n\n{table(record)}\n\n{END}{after}")


def main() -> int:
    known = {mutant.name: mutant for mutant in mutants() if mutant.name not in SEEN_BY}
    record, survivors = {}, []
    with ProcessPoolExecutor(2) as pool:
        for name, schedules, complaint in pool.map(search, known):
            print(f"{known[name].area:16} {name:34} {schedules:5} {complaint or 'SURVIVES'}", flush=True)
            record[name] = entry(known[name], schedules, complaint)
            if not complaint:
                survivors.append(name)
    write(record)
    print(f"{len(record)} mutants, {len(survivors)} survive {SEEDS_MAX} schedules: {survivors}")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())

"""The same program in processes with other hash seeds: nothing may depend on the order of a set."""

import os
import subprocess
import sys
from pathlib import Path

PATHS = (Path(__file__).parents[2], Path(__file__).parents[1])


def printed(program: str) -> set[str]:
    """What they print: one text, if all is well."""
    return {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(map(str, PATHS))},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for hash_seed in ("0", "1", "random")
    }

"""`make sim SEED=…`: one world, told step by step."""

import argparse
import logging
import sys
import traceback
from random import Random

from sim.whole.system import System


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int)
    logging.disable(logging.CRITICAL)
    system = System(Random(parser.parse_args().seed), tell=print)
    try:
        system.live()
    except Exception:  # noqa: BLE001  whatever it is, it is what was looked for
        traceback.print_exc(file=sys.stdout)
        return 1
    finally:
        print(dict(system.counts))
    print(f"all is well after {system.time.now_ms} simulated ms: {system.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

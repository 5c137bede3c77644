"""Runs a command that is bound by file permissions, also when root starts it.

usage: unprivileged.py COMMAND [ARGUMENT ...]
"""

import ctypes
import os
import sys

PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE = 1
CAP_DAC_READ_SEARCH = 2


def main() -> None:
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), f"root keeps capability {capability}")
    os.execv(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()

"""A wall clock that jumps, for one process and its children: a library that is loaded before the C library.

What the file says, in seconds, is added to CLOCK_REALTIME; all other clocks are as they are.
"""

import subprocess
from pathlib import Path

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int rc = real(id, at);
    if (id == CLOCK_REALTIME) {
        FILE *file = fopen(getenv("CLOCK_OFFSET_FILE"), "r");
        long offset = 0;
        if (file) { if (fscanf(file, "%ld", &offset) != 1) offset = 0; fclose(file); }
        at->tv_sec += offset;
    }
    return rc;
}
"""


class JumpyClock:
    def __init__(self, folder: Path, compiler: str = "cc") -> None:
        source, library = folder / "clock.c", folder / "clock.so"
        self._offset = folder / "offset"
        self.jump_to(0)
        source.write_text(SOURCE)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._offset)}

    def jump_to(self, offset_s: int) -> None:
        """From the true time."""
        fresh = self._offset.with_name("offset.new")
        fresh.write_text(str(offset_s))
        fresh.rename(self._offset)

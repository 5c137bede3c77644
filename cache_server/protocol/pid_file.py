"""`server.pid`: the number of the process that serves a runtime dir, and where that number counts.

Containers that share the dir have pid namespaces of their own, in which the same number is another process.
So the second line names the namespace, as the kernel does; a file of one line alone says nothing about it.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

PID_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class ServerPid:
    pid: int
    namespace: str  # "" where that is not known

    @classmethod
    def own(cls) -> "ServerPid":
        return cls(os.getpid(), own_namespace())

    @property
    def counts_here(self) -> bool:
        """Whether the number means the same process to us; as far as is known."""
        own = own_namespace()
        return self.namespace == own or "" in (self.namespace, own)

    @property
    def is_stopped(self) -> bool:
        """By SIGSTOP or a debugger, as far as that can be seen from here."""
        with contextlib.suppress(OSError, IndexError):
            stat = Path(f"/proc/{self.pid}/stat").read_text()
            return self.counts_here and stat.rpartition(")")[2].split()[0] in ("T", "t")
        return False

    @property
    def text(self) -> str:
        return f"{self.pid}\n{self.namespace}\n"


def own_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def read_pid(file: Path) -> ServerPid:
    """Raises `OSError`, and `ValueError` where it says something else."""
    text = file.read_text()
    pid, _, rest = text.strip().partition("\n")
    if not pid.isdecimal() or not 1 <= int(pid) <= PID_MAX:
        raise ValueError(f"{file} has {text[:40]!r}: expected a process id, and its pid namespace")
    return ServerPid(int(pid), rest.strip())

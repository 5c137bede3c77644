"""What the doctor reads from the arena and from the list of mounts."""

import pytest

from cache_server.protocol import messages as m
from lmconnector.doctor.findings import Verdict
from lmconnector.doctor.visit import RefusedError

MOUNTS = """\
overlay / overlay rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
hugetlbfs /mnt/huge hugetlbfs rw 0 0
/dev/sda1 /mnt/huge\\040two ext4 rw 0 0
/dev/sdb1 /dev/shm/over ext4 rw 0 0
tmpfs /dev/shm/over tmpfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/dev/shm/cache/arena", "tmpfs"),
        ("/dev/shmother/arena", "overlay"),
        ("/mnt/huge/arena", "hugetlbfs"),
        ("/mnt/huge two/arena", "ext4"),
        ("/dev/shm/over/arena", "tmpfs"),
        ("/arena", "overlay"),
    ],
)
def test_the_file_system_is_that_of_the_longest_mount_and_of_the_last_one_on_it(path: str, kind: str) -> None:
    pytest.importorskip("torch")
    from lmconnector.doctor.memory import filesystem

    assert filesystem(path, MOUNTS) == kind


class Refusing:
    """A server that has registered the visitor once, and does not do so again."""

    def register(self, part_bytes: int) -> m.Registered:
        raise RefusedError(
            m.Ping(id=1), m.Refused(id=1, boot=1, code="INTERNAL", detail=f"{part_bytes} bytes")
        )


def test_a_registration_with_a_chunks_size_may_be_refused_too() -> None:
    pytest.importorskip("torch")
    from lmconnector.doctor.memory import chunk
    from paged import mapped_arena

    with mapped_arena() as arena:
        finding = chunk(Refusing(), arena)
    assert (finding.check, finding.verdict) == ("chunk", Verdict.FAIL)
    assert finding.found == "PING was refused: INTERNAL: 1048576 bytes"
    assert finding.advice == "look at the server's log"

"""Every message there is, typed.  docs/protocol.md is the prose of this file.

A message is one MessagePack map.  Fields that a peer does not know are ignored; fields with a default may be
left out; everything else is checked here, by type and by bound, before any code sees it.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from cache_server.protocol.keys import HASH_BYTES, SLOT_NAME_BYTES, SLOT_REF

VERSION_MIN = 1
VERSION_MAX = 1
CANARY = "canary"  # its work is no traffic: not counted, evicts nothing, leaves nothing behind
FEATURES: tuple[str, ...] = (CANARY,)  # optional behaviour a peer may ask for

# Limits of one message.  The reply to the largest LOOKUP of all groups stays below `MESSAGE_BYTES_MAX`.
MESSAGE_BYTES_MAX = 2 << 20
REPLY_BYTES_MAX = 4 << 20
FRAME_BYTES_MAX = 4 << 20  # ZeroMQ drops the connection beyond this, before it allocates
CHUNKS_MAX = 4096  # keys of one LOOKUP, slots of one RESERVE, COMMIT or ABORT
LAYERS_MAX = 1024
GROUPS_MAX = 16
RANKS_MAX = 1024
ITEMS_MAX = 32 * LAYERS_MAX  # values in one request, nested ones counted
REPLY_ITEMS_MAX = 8 * ITEMS_MAX  # STATUS tells of every worker
DEPTH_MAX = 8
ID_MAX = 2**63 - 1

Id = Annotated[int, Meta(ge=0, le=ID_MAX)]
Count = Annotated[int, Meta(ge=0, le=2**48)]
Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=512)]
FileName = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"\A[A-Za-z0-9._-]+\Z")]
RequestName = Annotated[str, Meta(min_length=1, max_length=256)]
Namespace = Annotated[bytes, Meta(min_length=1, max_length=64)]
Hashes = Annotated[bytes, Meta(max_length=32 * CHUNKS_MAX)]
SlotNames = Annotated[bytes, Meta(max_length=12 * CHUNKS_MAX)]
GroupNumber = Annotated[int, Meta(ge=0, lt=GROUPS_MAX)]
Dimensions = Annotated[tuple[Count, ...], Meta(max_length=8)]
SlotRefs = Annotated[bytes, Meta(max_length=20 * CHUNKS_MAX)]
PartOffsets = Annotated[tuple[Count, ...], Meta(max_length=RANKS_MAX)]
Phase = Literal["warming", "ready"]


def _check_whole(name: str, packed: bytes, item_bytes: int) -> None:
    if len(packed) % item_bytes:
        raise ValueError(f"{name} has {len(packed)} bytes, expected a multiple of {item_bytes}")


class Request(Struct, kw_only=True, frozen=True, tag_field="op"):
    id: Id  # the reply carries it back


class Reply(Struct, kw_only=True, frozen=True, tag_field="op"):
    id: Id
    boot: Id  # of the server that answered


class Layer(Struct, frozen=True):
    name: Name
    shape: Dimensions
    strides: Dimensions
    dtype: Name


class Group(Struct, frozen=True):
    """One KV cache group: `part_bytes` of one chunk on this rank; `window` > 0: only that many chunks before
    the end of a prefix are needed (sliding window), 0: all of them."""

    part_bytes: Annotated[int, Meta(ge=1, le=2**40)]
    window: Annotated[int, Meta(ge=0, lt=2**16)] = 0
    layers: Annotated[tuple[Id, ...], Meta(max_length=LAYERS_MAX)] = ()


class Layout(Struct, frozen=True, kw_only=True):
    """What a worker's KV cache looks like."""

    groups: Annotated[tuple[Group, ...], Meta(min_length=1, max_length=GROUPS_MAX)]
    layers: Annotated[tuple[Layer, ...], Meta(max_length=LAYERS_MAX)] = ()
    device: Name = "cpu"
    dtype: Name = "bfloat16"
    block_tokens: Count = 0
    block_bytes: Count = 0
    chunk_tokens: Count = 0
    part: Annotated[int, Meta(ge=0, lt=RANKS_MAX)] = 0  # ranks with equal KV share one part
    parts: Annotated[int, Meta(ge=1, le=RANKS_MAX)] = 1
    tp: Count = 1
    tp_rank: Count = 0
    pp: Count = 1
    pp_rank: Count = 0

    def __post_init__(self) -> None:
        if self.part >= self.parts:
            raise ValueError(f"part {self.part} of {self.parts}")


class Register(Request, tag="register", kw_only=True, frozen=True):
    version_min: Annotated[int, Meta(ge=0, le=2**31)]
    version_max: Annotated[int, Meta(ge=0, le=2**31)]
    features: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    engine: Name
    instance: Text = ""  # which start of the engine
    role: Literal["worker", "scheduler"]
    rank: Annotated[int, Meta(ge=0, lt=RANKS_MAX)] = 0
    world: Annotated[int, Meta(ge=1, le=RANKS_MAX)] = 1
    namespace: Namespace
    proof: FileName  # the presence file this process holds locked
    pid: Count = 0  # for people; the proof is the lock
    phase: Phase = "warming"
    layout: Layout | None = None  # workers only

    def __post_init__(self) -> None:
        if self.rank >= self.world:
            raise ValueError(f"rank {self.rank} of {self.world}")


class Unregister(Request, tag="unregister", kw_only=True, frozen=True):
    session: Id


class Ping(Request, tag="ping", kw_only=True, frozen=True):
    session: Id = 0  # 0: somebody without a registration asks
    seq: Id = 0
    phase: Phase = "ready"
    progress: Count = 0


class Lookup(Request, tag="lookup", kw_only=True, frozen=True):
    session: Id
    request: RequestName  # the lease goes by this name
    hashes: Hashes  # of the prompt's chunks, first to last
    epoch: Count = 0

    def __post_init__(self) -> None:
        _check_whole("hashes", self.hashes, HASH_BYTES)


class Release(Request, tag="release", kw_only=True, frozen=True):
    session: Id
    requests: Annotated[tuple[RequestName, ...], Meta(max_length=CHUNKS_MAX)]


class Reserve(Request, tag="reserve", kw_only=True, frozen=True):
    session: Id
    group: GroupNumber = 0
    count: Annotated[int, Meta(ge=1, le=CHUNKS_MAX)]


class Commit(Request, tag="commit", kw_only=True, frozen=True):
    """Consecutive chunks of one prefix and their slots; `parent` is the hash before the first."""

    session: Id
    group: GroupNumber = 0
    parent: Annotated[bytes, Meta(max_length=32)] = b""
    hashes: Hashes
    slots: SlotNames
    epoch: Count = 0

    def __post_init__(self) -> None:
        _check_whole("hashes", self.hashes, HASH_BYTES)
        _check_whole("slots", self.slots, SLOT_NAME_BYTES)
        if len(self.parent) not in (0, HASH_BYTES):
            raise ValueError(f"parent has {len(self.parent)} bytes, expected none or {HASH_BYTES}")
        hashes, slots = len(self.hashes) // HASH_BYTES, len(self.slots) // SLOT_NAME_BYTES
        if hashes != slots:
            raise ValueError(f"{hashes} hashes for {slots} slots")


class Abort(Request, tag="abort", kw_only=True, frozen=True):
    """Gives back these slots or, with `all_but`, all others the engine has reserved: so a client that lost a
    reply knows again what it holds."""

    session: Id
    slots: SlotNames
    all_but: bool = False

    def __post_init__(self) -> None:
        _check_whole("slots", self.slots, SLOT_NAME_BYTES)


class Clear(Request, tag="clear", kw_only=True, frozen=True):
    """With a session: this engine's namespace.  With the admin token: everything."""

    session: Id = 0
    epoch: Count = 0
    token: Text = ""


class Status(Request, tag="status", kw_only=True, frozen=True):
    workers: bool = False


class Arena(Struct, frozen=True):
    path: str
    id: bytes
    version: Count
    file_bytes: Count
    capacity_bytes: Count


class Registered(Reply, tag="registered", kw_only=True, frozen=True):
    version: Count
    features: tuple[str, ...]
    session: Id
    arena: Arena
    lease_ms: Count
    silent_after_ms: Count


class Done(Reply, tag="done", kw_only=True, frozen=True):
    """UNREGISTER, RELEASE, ABORT, CLEAR: `count` things were let go."""

    count: Count = 0


class Pong(Reply, tag="pong", kw_only=True, frozen=True):
    seq: Id
    known: bool
    state: Literal["starting", "ready", "draining"]
    progress: Count  # requests served since boot
    silence_ms: Count  # since this member's previous ping, or its registration


class Part(Struct, frozen=True):
    """The chunks [first, first + len(slots)) of one group."""

    first: Count
    slots: SlotRefs

    def __post_init__(self) -> None:
        _check_whole("slots", self.slots, SLOT_REF.size)


class Found(Reply, tag="found", kw_only=True, frozen=True):
    chunks: Count  # the longest prefix complete on all ranks
    groups: Annotated[tuple[Part, ...], Meta(max_length=GROUPS_MAX)] = ()
    part_offsets: tuple[PartOffsets, ...] = ()  # per group, per part: where it begins in a slot
    lease_ms: Count = 0

    def __post_init__(self) -> None:
        if self.chunks and not self.groups:
            raise ValueError(f"{self.chunks} chunks without slots")
        if len(self.groups) != len(self.part_offsets):
            raise ValueError(f"part offsets of {len(self.part_offsets)} groups for {len(self.groups)}")
        for group in self.groups:
            if group.first + len(group.slots) // SLOT_REF.size != self.chunks:
                raise ValueError(f"a group's slots do not end with chunk {self.chunks}")


class Reserved(Reply, tag="reserved", kw_only=True, frozen=True):
    slots: SlotRefs
    slot_bytes: Count
    part_offsets: PartOffsets

    def __post_init__(self) -> None:
        _check_whole("slots", self.slots, SLOT_REF.size)


class Committed(Reply, tag="committed", kw_only=True, frozen=True):
    outcomes: Annotated[bytes, Meta(max_length=CHUNKS_MAX)]  # for each slot an `Outcome`


class Outcome:
    STORED = 0
    EXISTS = 1  # the key was there: it keeps its slot, this one went back
    ORPHAN = 2  # its parent is not stored: this slot went back
    FOREIGN = 3  # not reserved by this engine under this generation: nothing happened


class StatusReply(Reply, tag="status", kw_only=True, frozen=True):
    status: dict[str, "object"] = field(default_factory=dict)


class Code:
    """Why a request was refused.  `docs/protocol.md` says what a client does about each."""

    VERSION = "VERSION"
    MALFORMED = "MALFORMED"
    UNKNOWN_OP = "UNKNOWN_OP"
    TOO_LARGE = "TOO_LARGE"
    UNKNOWN_SESSION = "UNKNOWN_SESSION"
    NO_PROOF = "NO_PROOF"
    INCOMPLETE = "INCOMPLETE"
    NO_SPACE = "NO_SPACE"
    BUSY = "BUSY"
    DENIED = "DENIED"
    DRAINING = "DRAINING"
    INTERNAL = "INTERNAL"


class Refused(Reply, tag="refused", kw_only=True, frozen=True):
    code: str
    detail: str


AnyRequest = Register | Unregister | Ping | Lookup | Release | Reserve | Commit | Abort | Clear | Status
AnyReply = Registered | Done | Pong | Found | Reserved | Committed | StatusReply | Refused

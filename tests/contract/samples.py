"""One fixed message of every type, with every field set to something other than its default."""

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SLOT_REF, SlotRef, pack_slot_names

SESSION = 0x1122334455667788
BOOT = 0x0102030405060708
HASHES = (bytes(range(32)), bytes(range(100, 132)))
SLOTS = (SlotRef(0x200000, (3 << 40) + 1, 5), SlotRef(0x210000, (3 << 40) + 2, 6))
PACKED_SLOTS = b"".join(SLOT_REF.pack(*slot) for slot in SLOTS)

LAYOUT = m.Layout(
    groups=(m.Group(131072, window=0, layers=(0, 2)), m.Group(65536, window=4, layers=(1,))),
    layers=(
        m.Layer("model.layers.0.self_attn", (2, 16, 8, 128), (16384, 1024, 128, 1), "bfloat16"),
        m.Layer("model.layers.1.self_attn", (2, 16, 4, 128), (8192, 512, 128, 1), "bfloat16"),
        m.Layer("model.layers.2.self_attn", (), (), "uint8"),
    ),
    device="cuda:1",
    dtype="float16",
    block_tokens=16,
    block_bytes=32768,
    chunk_tokens=256,
    part=1,
    parts=2,
    tp=2,
    tp_rank=1,
    pp=3,
    pp_rank=2,
)

REQUESTS: tuple[m.Request, ...] = (
    m.Register(
        id=1,
        version_min=1,
        version_max=3,
        features=("disk", "größe"),
        engine="engine-0",
        instance="1760000000000000000",
        role="worker",
        rank=1,
        world=2,
        namespace=b"\x00\xffmodel",
        proof="0123456789abcdef0123456789abcdef.4711.a1",
        pid=4711,
        phase="ready",
        layout=LAYOUT,
    ),
    m.Unregister(id=2, session=SESSION),
    m.Ping(id=3, session=SESSION, seq=300, phase="warming", progress=70000),
    m.Lookup(id=4, session=SESSION, request="cmpl-1", hashes=b"".join(HASHES), epoch=9),
    m.Release(id=5, session=SESSION, requests=("cmpl-1", "cmpl-2")),
    m.Reserve(id=6, session=SESSION, group=1, count=64),
    m.Commit(
        id=7,
        session=SESSION,
        group=1,
        parent=bytes(32),
        hashes=b"".join(HASHES),
        slots=pack_slot_names(SLOTS),
        epoch=9,
    ),
    m.Abort(id=8, session=SESSION, slots=pack_slot_names(SLOTS), all_but=True),
    m.Clear(id=9, session=SESSION, epoch=9, token="secret"),
    m.Status(id=m.ID_MAX, workers=True),
)

REPLIES: tuple[m.Reply, ...] = (
    m.Registered(
        id=1,
        boot=BOOT,
        version=1,
        features=("disk",),
        session=SESSION,
        arena=m.Arena("/run/cache/arena", bytes(range(16)), 1, 77_594_624, 67_108_864),
        lease_ms=30_000,
        silent_after_ms=5_000,
    ),
    m.Done(id=2, boot=BOOT, count=12),
    m.Pong(id=3, boot=BOOT, seq=300, known=True, state="draining", progress=1_000_000, silence_ms=1_001),
    m.Found(
        id=4,
        boot=BOOT,
        chunks=2,
        groups=(m.Part(0, PACKED_SLOTS), m.Part(1, PACKED_SLOTS[SLOT_REF.size :])),
        part_offsets=((0, 131072), (0, 65536)),
        lease_ms=30_000,
    ),
    m.Reserved(id=6, boot=BOOT, slots=PACKED_SLOTS, slot_bytes=262144, part_offsets=(0, 131072)),
    m.Committed(id=7, boot=BOOT, outcomes=bytes([0, 1, 2, 3])),
    m.StatusReply(id=8, boot=BOOT, status={"state": "ready", "arena": {"free_bytes": 1}, "rows": [None, -1]}),
    m.Refused(id=0, boot=m.ID_MAX, code=m.Code.BUSY, detail="ask again in a second"),
)

"""Slots reserved ahead of need.  vLLM's scheduler thread only.

A slot is in the stock, or it is *out*: workers copy into it, or its commit is on its way.  When a reply is
lost, nobody here knows what became of some slots; then the server is told which ones we know of, and takes
the rest back.
"""

import logging

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, pack_slot_names, split_slot_refs
from cache_server.protocol.messages import Code
from lmconnector.client import Client
from lmconnector.gate import RETRY_MS, Gate

log = logging.getLogger(f"vllm.{__name__}")


class Stock:
    def __init__(self, client: Client, gate: Gate, groups: int, target: int, deadline_ms: int) -> None:
        self.part_offsets: dict[int, tuple[int, ...]] = {}
        self.arena = b""  # in which the slots are
        self._client = client
        self._gate = gate
        self._slots: list[list[SlotRef]] = [[] for _ in range(groups)]
        self._out: dict[SlotRef, None] = {}
        self._asked = [False] * groups
        self._wanted = self._most = self._target = target  # the server has a bound for what one engine holds
        self._deadline_ms = deadline_ms
        self._not_before_ms = 0
        self._told: set[str] = set()  # why it gave none
        self._unsure = False  # the server may think that we hold more than we do
        client.on_stray = self._take_stray

    def is_awaited(self, now_ms: int) -> bool:
        """Whether slots may come at any moment; asked in the midst of a plan, which is for this arena."""
        self._top_up(now_ms)
        return any(self._asked)

    def take(self, group: int) -> SlotRef | None:
        if not self._slots[group]:
            return None
        slot = self._slots[group].pop()
        self._out[slot] = None
        return slot

    def put_back(self, group: int, slot: SlotRef) -> None:
        del self._out[slot]
        self._slots[group].append(slot)

    def settled(self, slots: list[SlotRef]) -> None:
        """The server has answered their commit."""
        for slot in slots:
            self._out.pop(slot, None)

    def lost(self, slots: list[SlotRef]) -> None:
        """Whether they were committed is not known, or they won't be."""
        self.settled(slots)
        self._unsure = True

    def refill(self, now_ms: int) -> None:
        """Asks for what is missing; the reply comes with some later step."""
        if not self._gate.usable:
            return
        if self.arena != self._gate.arena:
            self._forget(self._gate.arena)
        self._top_up(now_ms)

    def _top_up(self, now_ms: int) -> None:
        if now_ms < self._not_before_ms or any(self._asked):
            return
        if self._unsure:
            self._tell_what_we_hold(now_ms)
            return
        for group, slots in enumerate(self._slots):
            if len(slots) <= self._target // 2:
                self._ask(group, now_ms)

    def give_back(self) -> None:
        """All that is not out."""
        for slots in self._slots:
            slots.clear()
        self._tell_what_we_hold(0)

    def _forget(self, arena: bytes) -> None:
        """Another arena: what we held is no more, and it may have more room."""
        self.arena = arena
        self._most = self._target = self._wanted
        self._out.clear()
        for slots in self._slots:
            slots.clear()

    def _ask(self, group: int, now_ms: int) -> None:
        arena = self.arena

        def take(reply: m.Reply | None) -> None:
            self._asked[group] = False
            if isinstance(reply, m.Reserved) and arena == self.arena:
                self._slots[group] += reversed(split_slot_refs(reply.slots))
                self.part_offsets[group] = reply.part_offsets
                self._target = min(2 * self._target, self._most)
                return
            self._unsure |= reply is None or isinstance(reply, m.Reserved)
            if isinstance(reply, m.Refused) and arena == self.arena:
                self._want_less(group, count, reply, now_ms)
            else:
                self._not_before_ms = now_ms + RETRY_MS

        self._asked[group] = True
        count = self._target - len(self._slots[group])
        request = m.Reserve(id=self._client.next_id(), session=self._gate.session, group=group, count=count)
        self._client.send(request, self._deadline_ms, take)

    def _want_less(self, group: int, count: int, refused: m.Refused, now_ms: int) -> None:
        too_many = refused.code == Code.TOO_LARGE and count > 1
        if too_many:
            self._most = self._target = min(self._target, count // 2)
        elif refused.code in (Code.TOO_LARGE, Code.BUSY):
            self._target = max(1, self._target // 2)
        self._trim()
        if not too_many:
            self._not_before_ms = now_ms + RETRY_MS
            self._tell(refused)
        elif len(self._slots[group]) < self._target and not self._unsure:
            self._ask(group, now_ms)  # at once: the first prompt has none yet to be stored into

    def _tell(self, refused: m.Refused) -> None:
        """Once for each reason; all but the one may pass."""
        if refused.code not in self._told:
            self._told.add(refused.code)
            level = logging.WARNING if refused.code == Code.TOO_LARGE else logging.INFO
            log.log(level, "store: the server gives no slots: %s: %s", refused.code, refused.detail)

    def _take_stray(self, reply: m.Reply) -> None:
        """Late, or a request that arrived twice: slots that nobody took."""
        self._unsure |= isinstance(reply, m.Reserved)

    def _trim(self) -> None:
        """One group does not keep what another one has no room for."""
        for slots in self._slots:
            surplus = max(0, len(slots) - self._target)
            del slots[:surplus]
            self._unsure |= surplus > 0

    def _tell_what_we_hold(self, now_ms: int) -> None:
        held = [*self._out, *(slot for slots in self._slots for slot in slots)]

        def check(reply: m.Reply | None) -> None:
            if not isinstance(reply, m.Done):
                self._unsure = True
                self._not_before_ms = now_ms + RETRY_MS

        self._unsure = False  # from here on: what is lost while this is on its way is to be told again
        request = m.Abort(
            id=self._client.next_id(),
            session=self._gate.session,
            slots=pack_slot_names(held),
            all_but=True,
        )
        self._client.send(request, self._deadline_ms, check)

"""One device for several roles: who has it now, and how it changes hands.

     turn(role) ──▶ waits ──▶ the holder's last user leaves ──▶ holder rests ──▶ role resumes ──▶ uses it ──▶ leaves

A role is a whole pool or group; any number of its calls may use the device together. The device stays with
whoever had it last until another role asks: resting and resuming cost seconds.

Why nobody waits for ever. A user of the device waits for nothing that another role would have to do on it: the
controller sees to that, by asking for a turn only when everything else is there (a batch, weights that were
published). So the last user leaves. Whoever asks while another role waits stands behind it, so users do not
follow each other without end. A role that died has nothing to put away and nothing to bring back: it loses its turn,
and what takes its place starts in a turn of its own.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field

from pilaf_ray.errors import RoleLostError

Turn = Callable[[], AbstractAsyncContextManager[None]]
"""``async with turn():`` has the device inside."""
own_device: Turn = nullcontext
"""The turn of a role that shares with nobody."""


@dataclass(kw_only=True, slots=True)
class _Seat:
    """One of the roles."""

    rest: Callable[[], Awaitable[None]] | None = None
    resume: Callable[[], Awaitable[None]] | None = None
    is_there: bool = False
    """Whether there is something on the device, or put away."""
    rests: bool = False
    users: int = 0
    waiting: deque["asyncio.Future[None]"] = field(default_factory=deque)


class TurnTaking:
    """Hands one device (or one on each of several nodes) from role to role.

    Example: ``turns = TurnTaking(); turns.join("learner", rest=…, resume=…)``, then
    ``async with turns.turn("learner"): …``
    """

    def __init__(self) -> None:
        self._seats: dict[str, _Seat] = {}
        self._holder: str | None = None
        self._order: deque[str] = deque()
        """Roles that wait, in the order in which they began to."""
        self._change: asyncio.Task[None] | None = None
        self.changes = 0
        """How often the device went to another role than before."""

    @property
    def holder(self) -> str | None:
        """Who has the device; None while it changes hands, and where nobody had it yet or its holder died."""
        return self._holder

    def join(self, role: str, *, rest: Callable[[], Awaitable[None]], resume: Callable[[], Awaitable[None]]) -> None:
        """``role`` has been started, in a turn of its own.

        Args:
            rest: frees the device; raises RoleLostError where the role has died.
            resume: takes it again, after ``rest``; raises RoleLostError too.
        """
        seat = self._seat(role)
        seat.rest, seat.resume = rest, resume
        seat.is_there, seat.rests = True, False

    def lost(self, role: str) -> None:
        """``role`` is gone, with all that it had on the device; :meth:`join` follows when it has been started again."""
        seat = self._seat(role)
        seat.is_there = seat.rests = False

    @asynccontextmanager
    async def turn(self, role: str) -> AsyncIterator[None]:
        """A block in which ``role`` has the device; it stands behind other roles that wait.

        Raises:
            RoleLostError: ``role`` does not come back.
        """
        await self._enter(role, joining=False)
        try:
            yield
        finally:
            self._leave(role)

    @asynccontextmanager
    async def within(self, role: str) -> AsyncIterator[None]:
        """As :meth:`turn`; but where ``role`` is using the device it goes in at once, whoever waits.

        For what others of the role, who have the device, wait for: a call inside a block, a replica that takes a
        lost one's place.
        """
        await self._enter(role, joining=True)
        try:
            yield
        finally:
            self._leave(role)

    async def close(self) -> None:
        """Hand nothing over any more."""
        if self._change is not None:
            self._change.cancel()
            await asyncio.gather(self._change, return_exceptions=True)

    def _seat(self, role: str) -> _Seat:
        return self._seats.setdefault(role, _Seat())

    async def _enter(self, role: str, *, joining: bool) -> None:
        seat = self._seat(role)
        if self._holder == role and self._change is None and (not self._order or (joining and seat.users)):
            seat.users += 1
            return
        granted = asyncio.get_running_loop().create_future()
        seat.waiting.append(granted)
        if role not in self._order:
            self._order.append(role)
        self._hand_over()
        try:
            await granted
        except asyncio.CancelledError:
            if not granted.cancelled() and granted.exception() is None:
                # Granted in the same moment.
                self._leave(role)
            raise

    def _leave(self, role: str) -> None:
        self._seat(role).users -= 1
        self._hand_over()

    def _hand_over(self) -> None:
        """Begin to give the device to whoever waits longest, if nobody uses it."""
        in_use = self._holder is not None and self._seat(self._holder).users
        if self._change is None and self._order and not in_use:
            # A task of its own: what waits may be cancelled, a role that is half put away may not.
            self._change = asyncio.create_task(self._handing_over())
            self._change.add_done_callback(self._handed_over)

    async def _handing_over(self) -> None:
        """Until somebody uses the device, or nobody waits."""
        while self._order:
            role = self._order[0]
            seat = self._seat(role)
            error: RoleLostError | None = None
            # Those who waited may have gone away: nothing is moved for nobody.
            if not all(waiting.done() for waiting in seat.waiting):
                try:
                    await self._give(role)
                except RoleLostError as loss:
                    error = loss
            self._order.popleft()
            while seat.waiting:
                granted = seat.waiting.popleft()
                if granted.done():
                    continue
                if error is not None:
                    granted.set_exception(error)
                else:
                    seat.users += 1
                    granted.set_result(None)
            if seat.users:
                break
        # Before those who were let in go on: what is part of their turn must not find it still changing.
        self._change = None

    async def _give(self, role: str) -> None:
        """Let the holder rest and ``role`` resume. Raises RoleLostError where ``role`` has died."""
        if self._holder not in (None, role):
            await self._put_away(self._seat(self._holder or ""))
            self._holder = None
        seat = self._seat(role)
        if seat.is_there and seat.rests and seat.resume is not None:
            seat.rests = False
            try:
                await seat.resume()
            except RoleLostError:
                seat.is_there = False
                raise
        if self._holder != role:
            self.changes += 1
        self._holder = role

    async def _put_away(self, holder: _Seat) -> None:
        if holder.is_there and holder.rest is not None:
            try:
                await holder.rest()
            except RoleLostError:
                holder.is_there = False
            else:
                holder.rests = holder.is_there

    def _handed_over(self, change: "asyncio.Task[None]") -> None:
        error = None if change.cancelled() else change.exception()
        if error is None:
            return
        self._change = None
        # A fault that is none of a role's death: nobody must wait for ever for it.
        while self._order:
            waiting = self._seat(self._order.popleft()).waiting
            while waiting:
                granted = waiting.popleft()
                if not granted.done():
                    granted.set_exception(error)

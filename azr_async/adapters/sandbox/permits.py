"""The right to compute, which passes on when its holder is done or has taken long."""

import asyncio


class Permit:
    """One of a semaphore's permits, already acquired."""

    def __init__(self, permits: asyncio.Semaphore) -> None:
        self._permits = permits
        self._is_held = True
        self._timer: asyncio.TimerHandle | None = None

    def expire_in(self, seconds: float) -> None:
        """From then on somebody else may compute, and this holder goes on beside the permits."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self.release)

    def release(self) -> None:
        """Give the permit back. Safe to call twice."""
        if self._timer is not None:
            self._timer.cancel()
        if self._is_held:
            self._is_held = False
            self._permits.release()

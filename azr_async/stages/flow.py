"""The two ends of the bounded flow: free slots -> work admitted, and BatchRequest -> RolloutBatch."""

import asyncio
from collections.abc import Callable, Mapping

from azr_async.algorithm.library import Library
from azr_async.algorithm.staleness import Flow
from azr_async.messages import Admission, BatchRequest, Challenge, Rollout, RolloutBatch
from azr_async.ports import Receiver, Sender


class Changed:
    """Wakes whoever waits for the flow: `notify` never blocks, and a notification is never missed between a check and
    the `wait` that follows it without an await."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all that wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Until the next `notify`."""
        await self._event.wait()


async def admit(
    admissions: Sender[Admission],
    challenges: Sender[Challenge],
    *,
    flow: Flow,
    library: Library,
    changed: Changed,
    stop: asyncio.Event,
    on_admitted: Callable[[Admission], None],
) -> None:
    """Start as much work as the lag bound allows, and no more.

    Groups are admitted while the flow has room; tasks of the library go straight to the solvers.

    consumes   nothing but free slots
    produces   admissions (new proposals) and challenges (library tasks), both closed on the way out; calls of
               `on_admitted`, before either is sent
    waits for  a change of the flow, then room in a channel
    cancelled  a slot that was charged for an unsent admission is lost with the process
    """
    async with admissions, challenges:
        while not stop.is_set():
            admission = flow.admit(library.solvable())
            if admission is None:
                await changed.wait()
                continue
            on_admitted(admission)
            if admission.is_proposal:
                await admissions.send(admission)
            else:
                await challenges.send(
                    Challenge(
                        group_id=admission.group_id,
                        problem=library.task(admission.task, draw=admission.group_id),
                        proposal=None,
                        attempts=admission.trained_attempts,
                        trained_attempts=admission.trained_attempts,
                    )
                )


async def supply(
    requests: Receiver[BatchRequest],
    batches: Sender[RolloutBatch],
    *,
    flow: Flow,
    library: Library,
    changed: Changed,
    on_batch: Callable[[int, list[Rollout]], None],
    on_dropped: Callable[[list[Rollout]], None],
    stats: Callable[[], Mapping[str, float]],
    notes: Mapping[str, str],
) -> None:
    """Hand the learner the oldest samples of every cell, as soon as they are there.

    Each request is answered with a balanced batch whose every token is within the lag bound. `notes` go with the first.

    consumes   requests, until the learner has closed
    produces   batches, in the order of the requests
    waits for  a request, then until the flow can compose the batch, then room in `batches`
    cancelled  samples of an unsent batch are lost with the process
    """
    async for request in requests:
        while True:
            dropped = flow.sweep(request.version)
            if dropped:
                on_dropped(dropped)
                changed.notify()
            rollouts = flow.compose(request.version, library.solvable())
            if rollouts is not None:
                break
            await changed.wait()
        on_batch(request.version, rollouts)
        await batches.send(RolloutBatch(version=request.version, rollouts=tuple(rollouts), stats=stats(), notes=notes))
        notes = {}

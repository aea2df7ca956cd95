"""Checkpoints are written beside training: it waits for the copy of what it trains, and for no disk.

What a disk refuses is tried again while training goes on, for the one before is whole, nothing that is trained is
wrong, and a disk is often full for a while only. Who needs the checkpoint to be there, the next one or the end of the
run, asks for a last attempt; if that fails too, the run ends. So never more than two intervals of training hang on it.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from azr_async.adapters import checkpoints
from azr_async.config import Config
from azr_async.errors import AzrError, CheckpointError

RETRY_SECONDS: Final = 15.0
"""Between two attempts that nobody waits for."""

log = logging.getLogger(__name__)


class Saver:
    """Writes one checkpoint at a time, in a thread of its own."""

    def __init__(
        self,
        write: Callable[[checkpoints.Content], object],
        root: Path,
        *,
        write_seconds: float,
        retry_seconds: float = RETRY_SECONDS,
    ) -> None:
        """`write` blocks until its checkpoint is on the disk, and raises CheckpointError when that takes none."""
        self._write, self._root = write, root
        self._write_seconds, self._retry_seconds = write_seconds, retry_seconds
        self._written: Future[None] | None = None
        self._is_awaited = threading.Event()

    @property
    def kept_step(self) -> int:
        """No run can go on from an earlier one."""
        return checkpoints.oldest_step(self._root)

    def begin(self, content: checkpoints.Content) -> None:
        """Write it from now on. The one before must be `done`: there are never two copies of the weights."""
        assert self._written is None
        self._written, self._is_awaited = Future(), threading.Event()
        # A daemon: a disk that does not answer must not keep the process from ending.
        work = partial(_work, partial(self._attempts, content, self._is_awaited), self._written)
        threading.Thread(target=work, name="checkpoint", daemon=True).start()

    async def done(self, seconds: float | None = None) -> None:
        """Return when what was begun is on the disk.

        Raises CheckpointError when it cannot be written, or not within `seconds` (default: `checkpoint.write_seconds`).
        """
        if self._written is None:
            return
        written, self._written = self._written, None
        limit = self._write_seconds if seconds is None else seconds
        self._is_awaited.set()
        try:
            async with asyncio.timeout(limit):
                await asyncio.shield(asyncio.wrap_future(written))
        except asyncio.CancelledError:
            self._written = written  # whoever ends the run waits for it still
            raise
        except TimeoutError:
            raise CheckpointError(
                f"a checkpoint in {self._root} was not written within {limit:g} s. Look whether its disk answers, "
                "raise checkpoint.write_seconds if it is only slow, then resume from the last checkpoint."
            ) from None

    def _attempts(self, content: checkpoints.Content, is_awaited: threading.Event) -> None:
        is_last = False
        while True:
            try:
                self._write(content)
                return
            except CheckpointError as error:
                if is_last:
                    raise
                log.warning("%s Until the next checkpoint is due, it is tried every %g s.", error, self._retry_seconds)
                is_last = is_awaited.wait(self._retry_seconds)


@asynccontextmanager
async def saving(
    config: Config, root: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> AsyncIterator[Saver]:
    """A saver for checkpoints below `root`. However the body ends, what was begun is written, or given up by name."""
    write = partial(checkpoints.save, root, model=model, tokenizer=tokenizer, keep=config.checkpoint.keep)
    saver = Saver(write, root, write_seconds=config.checkpoint.write_seconds)
    try:
        yield saver
    except BaseException:
        try:
            await saver.done(min(config.checkpoint.write_seconds, config.wires.stop_seconds))
        except AzrError as error:  # it must not hide what has gone wrong first
            log.error("%s", error)
        raise
    await saver.done()


def _work(work: Callable[[], None], done: "Future[None]") -> None:
    try:
        work()
    except BaseException as error:  # whoever waits has to hear of it
        done.set_exception(error)
    else:
        done.set_result(None)

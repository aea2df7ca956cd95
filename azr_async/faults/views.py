"""Each program's own view of the wires: in place of its peers it finds proxies, one for every wire that it sends on."""

import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from azr_async.algorithm.fault_schedule import Plan, programs, wire_target, wires
from azr_async.faults import inside
from azr_async.faults.proxy import Proxy

Proxies = Mapping[str, Proxy]
"""By what faults call them."""


def prepare_site(folder: Path) -> None:
    """Put into `folder` what the programs of a run do when they start."""
    (folder / "site").mkdir()
    shutil.copyfile(inside.__file__, folder / "site" / "sitecustomize.py")


def clock_trigger(folder: Path, program: str) -> Path:
    """The file that makes the clock of a program jump, by the seconds that are in it."""
    return folder / f"{program}.clock"


@asynccontextmanager
async def open_proxies(folder: Path, plan: Plan) -> AsyncIterator[Proxies]:
    """Listen on every wire in the place of who listens there; `folder` must have a short name."""
    views = {name: folder / "wires" / name for name in programs(plan.workers, plan.ranks)}
    for view in views.values():
        view.mkdir(parents=True)
    async with AsyncExitStack() as stack:
        proxies = {}
        for sender, wire, owner in wires(plan.workers, plan.ranks):
            at_owner = views[owner] if owner in views else views[sender] / inside.REAL
            proxy = Proxy(views[sender] / wire, at_owner / wire)
            proxies[wire_target(sender, wire)] = await stack.enter_async_context(proxy.open())
        yield proxies

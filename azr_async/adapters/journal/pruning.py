"""The ledger keeps its size: what no run can open again becomes a few sums, a little at a time."""

import json
import sqlite3
from collections.abc import Callable
from typing import Final

from azr_async.adapters.journal.writer import Work
from azr_async.algorithm.ledger import before_first_open

GROUPS_AT_A_TIME: Final = 256
"""Some milliseconds of work: whoever waits for the journal meanwhile hardly notices."""

_OLDEST: Final = """
SELECT id, task, is_proposal, coalesce(min(stage IN ('trained', 'dropped') AND step <= :step), 1)
FROM (SELECT id, task, is_proposal FROM groups WHERE id > :after ORDER BY id LIMIT :count)
LEFT JOIN samples ON group_id = id GROUP BY id ORDER BY id"""
_SUM_UP: Final = (
    """
INSERT INTO steps (step, stage, reason, samples)
SELECT step, stage, reason, count(*) FROM samples WHERE group_id IN (SELECT value FROM json_each(:groups))
GROUP BY step, stage, reason
ON CONFLICT DO UPDATE SET samples = samples + excluded.samples""",
    """
INSERT INTO closed (task, is_proposal, newest, groups, samples)
SELECT task, is_proposal, max(id), count(*), sum(attempts + is_proposal)
FROM groups WHERE id IN (SELECT value FROM json_each(:groups)) GROUP BY task, is_proposal
ON CONFLICT DO UPDATE SET newest = excluded.newest, groups = groups + excluded.groups,
    samples = samples + excluded.samples""",
    "DELETE FROM samples WHERE group_id IN (SELECT value FROM json_each(:groups))",
    "DELETE FROM groups WHERE id IN (SELECT value FROM json_each(:groups))",
)


class Pruning:
    """Used on the writer's thread only, between other writes."""

    def __init__(self, put: Callable[[Work], object]) -> None:
        """`put` has work done later, in a transaction of its own or with other writes."""
        self._put = put
        self._step = self._after = 0
        self._stuck: set[tuple[str, bool]] = set()
        self._is_going_on = False

    def up_to(self, connection: sqlite3.Connection, step: int) -> None:
        """Begin to sum up what was closed in steps up to this one; `put` has the rest done."""
        self._step, self._after = step, -1
        self._stuck.clear()
        if not self._is_going_on:
            self._go_on(connection)

    def _go_on(self, connection: sqlite3.Connection) -> None:
        where = {"step": self._step, "after": self._after, "count": GROUPS_AT_A_TIME}
        rows = connection.execute(_OLDEST, where).fetchall()
        groups = [(number, (task, bool(is_proposal)), bool(closed)) for number, task, is_proposal, closed in rows]
        chosen = before_first_open(groups, self._stuck)
        self._is_going_on = bool(chosen)
        if not chosen:  # newer ones can hardly be closed for ever, and there is a next time
            return
        self._after = groups[-1][0]
        for statement in _SUM_UP:
            connection.execute(statement, {"groups": json.dumps(chosen)})
        self._put(self._go_on)

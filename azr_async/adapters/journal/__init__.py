"""`journal.sqlite`: the library of valid tasks and the ledger of work, docs/journal.md."""

from azr_async.adapters.journal.journal import SqliteJournal
from azr_async.adapters.journal.schema import SCHEMA_VERSION

__all__ = ["SCHEMA_VERSION", "SqliteJournal"]

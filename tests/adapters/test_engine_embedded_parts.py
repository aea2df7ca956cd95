"""The engine's small parts: compaction of rows, prefill batches, stop texts, the order of waiting sequences."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as some

from azr_async.adapters.engines.embedded.cache import prefill_order
from azr_async.adapters.engines.embedded.rows import compaction
from azr_async.adapters.engines.embedded.waiting import Waiting
from azr_async.adapters.engines.texts import Texts
from azr_async.messages import Prompt
from tests.random_models import END, a_job, byte_tokenizer

TEXTS = Texts(byte_tokenizer(), frozenset({END}))


@given(is_ended=some.lists(some.booleans(), min_size=1, max_size=40))
def test_compaction_keeps_every_running_row_once_and_moves_no_more_than_ended(is_ended: list[bool]) -> None:
    rows = np.arange(len(is_ended))
    ended = np.flatnonzero(is_ended)
    holes, movers = compaction(len(rows), ended)
    kept = rows.copy()
    kept[holes] = kept[movers]
    assert sorted(kept[: len(rows) - len(ended)]) == sorted(set(rows) - set(ended))
    assert len(movers) <= len(ended)


@given(lengths=some.lists(some.integers(0, 50), max_size=30), most=some.integers(1, 200))
def test_prefill_batches_hold_every_sequence_once_within_the_limit(lengths: Sequence[int], most: int) -> None:
    batches = prefill_order(lengths, most)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or max(lengths[index] for index in batch) * len(batch) <= most


@given(text=some.text(max_size=12), stop=some.text(min_size=1, max_size=3))
def test_a_stop_text_is_seen_at_the_token_that_completes_it(text: str, stop: str) -> None:
    prompt = Prompt(text="", stop=(stop,))
    ids = np.asarray(byte_tokenizer()(text + stop)["input_ids"], np.int64)
    seen = [end for end in range(1, len(ids) + 1) if TEXTS.has_stopped(prompt, ids[:end])]
    first = len((text + stop)[: (text + stop).index(stop) + len(stop)].encode())
    assert seen[0] == first
    assert TEXTS.completion_text(prompt, ids[: seen[0]]).endswith(stop)


@given(jobs=some.lists(some.tuples(some.integers(0, 3), some.integers(1, 4)), max_size=10), most=some.integers(1, 9))
def test_sequences_are_taken_by_priority_then_job_and_none_is_lost(jobs: list[tuple[int, int]], most: int) -> None:
    waiting = Waiting()
    for job_id, (priority, samples) in enumerate(jobs):
        waiting.add(a_job(job_id, priority=priority, samples=samples), np.array([job_id], np.int32))
    taken = []
    while waiting:
        groups = waiting.take(most)
        assert 0 < sum(map(len, groups)) <= most
        taken += [(sequence.job_id, sequence.index) for group in groups for sequence in group]
    order = sorted(range(len(jobs)), key=lambda job_id: (jobs[job_id][0], job_id))
    assert taken == [(job_id, index) for job_id in order for index in range(jobs[job_id][1])]

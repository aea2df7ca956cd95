"""Every message survives the wire; whatever else arrives is refused, whole and by name."""

import dataclasses
from collections.abc import Callable
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from azr_async.adapters.channels import wire
from azr_async.errors import MessageError
from azr_async.messages import (
    ROLES,
    TASKS,
    BatchRequest,
    CancelJob,
    Completion,
    EvaluationRequest,
    EvaluationResult,
    GenerateJob,
    GenerationResults,
    GivenUp,
    Handover,
    JoinWeights,
    Message,
    Progress,
    Prompt,
    PushWeights,
    Rollout,
    RolloutBatch,
    SelfPlayState,
    StateRequest,
    WeightsInstalled,
    WeightsJoined,
    WeightsReady,
    WorkerReady,
)

LIMIT_BYTES = 1_000_000

texts = st.text(max_size=20)
counts = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats()


def int32s(length: int | None = None) -> st.SearchStrategy[Any]:
    return arrays.arrays(np.int32, st.integers(0, 9) if length is None else length)


def float32s(length: int | None = None) -> st.SearchStrategy[Any]:
    return arrays.arrays(np.float32, st.integers(0, 9) if length is None else length)


def tuples(items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(items, max_size=3).map(tuple)


prompts = st.builds(Prompt, text=texts, is_chat=st.booleans(), keep_special_tokens=st.booleans(), stop=tuples(texts))


@st.composite
def completions(draw: Callable[..., Any]) -> Completion:
    length = draw(st.integers(0, 9))
    return Completion(
        job_id=draw(counts),
        index=draw(counts),
        finish=draw(st.sampled_from(["stop", "length", "prompt_too_long"])),
        text=draw(texts),
        prompt_ids=draw(int32s()),
        token_ids=draw(int32s(length)),
        behavior_logp=draw(float32s(length)),
        token_version=draw(int32s(length)),
    )


@st.composite
def rollouts(draw: Callable[..., Any]) -> Rollout:
    length = draw(st.integers(0, 9))
    return Rollout(
        rollout_id=draw(counts),
        group_id=draw(counts),
        role=draw(st.sampled_from(ROLES)),
        task=draw(st.sampled_from(TASKS)),
        token_ids=draw(int32s(length)),
        behavior_logp=draw(float32s(length)),
        token_version=draw(int32s(length)),
        reward=draw(numbers),
    )


MESSAGES: dict[type[Any], st.SearchStrategy[Any]] = {
    GenerateJob: st.builds(
        GenerateJob,
        job_id=counts,
        prompt=prompts,
        samples=counts,
        priority=counts,
        temperature=numbers,
        top_p=numbers,
        max_tokens=counts,
        seed=counts,
        indices=tuples(counts),
    ),
    GenerationResults: st.builds(
        GenerationResults,
        worker=texts,
        completions=tuples(completions()),
        busy_seconds=numbers,
        generated_tokens=counts,
    ),
    CancelJob: st.builds(CancelJob, job_id=counts),
    WorkerReady: st.builds(WorkerReady, worker=texts, endpoint=texts, slots=counts, ranks=counts, incarnation=counts),
    BatchRequest: st.builds(BatchRequest, version=counts),
    RolloutBatch: st.builds(
        RolloutBatch,
        version=counts,
        rollouts=tuples(rollouts()),
        stats=st.dictionaries(texts, numbers, max_size=3),
        incarnation=counts,
    ),
    Handover: st.builds(Handover, incarnation=counts, has_begun=st.booleans(), held=tuples(counts)),
    StateRequest: st.builds(StateRequest, version=counts),
    SelfPlayState: st.builds(SelfPlayState, version=counts, state=texts, incarnation=counts),
    WeightsReady: st.builds(
        WeightsReady, version=counts, workers=st.dictionaries(texts, counts, max_size=3), max_lag=counts | st.none()
    ),
    EvaluationRequest: st.builds(EvaluationRequest, version=counts),
    EvaluationResult: st.builds(
        EvaluationResult, version=counts, tasks=tuples(st.sampled_from(TASKS)), solved=tuples(st.booleans())
    ),
    PushWeights: st.builds(PushWeights, version=counts, canary_ids=tuples(int32s()), group=counts),
    WeightsInstalled: st.builds(
        WeightsInstalled, worker=texts, version=counts, canary_logp=float32s(), pause_seconds=numbers, group=counts
    ),
    JoinWeights: st.builds(JoinWeights, host=texts, port=counts, rank=counts, world_size=counts, group=counts),
    WeightsJoined: st.builds(WeightsJoined, worker=texts, group=counts),
    GivenUp: st.builds(GivenUp, why=texts),
    Progress: st.builds(Progress, process=texts, phase=texts, done=counts, total=counts),
}

messages = st.one_of(*MESSAGES.values())


def as_plain(value: object) -> object:
    """Comparable with ==, bit for bit: arrays become their dtype and bytes, numbers their representation."""
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return (type(value), [(name, as_plain(getattr(value, name))) for name in names])
    if isinstance(value, np.ndarray):
        return (value.dtype, value.shape, value.tobytes())
    if isinstance(value, tuple):
        return tuple(as_plain(item) for item in value)
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return repr(value)


def test_every_kind_of_message_is_tried_here() -> None:
    assert set(MESSAGES) == set(get_args(Message))


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_a_message_arrives_as_it_was_sent(kind: type[Any]) -> None:
    @given(MESSAGES[kind])
    @settings(max_examples=50, deadline=None)
    def arrives(message: Message) -> None:
        assert as_plain(wire.decode(wire.encode(message), limit_bytes=LIMIT_BYTES)) == as_plain(message)

    arrives()


@given(st.binary(max_size=200))
@settings(deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        wire.decode(data, limit_bytes=LIMIT_BYTES)


@given(messages, st.data())
@settings(deadline=None)
def test_a_truncated_message_is_refused(message: Message, data: st.DataObject) -> None:
    whole = wire.encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(MessageError):
        wire.decode(whole[:cut], limit_bytes=LIMIT_BYTES)


@given(messages, st.binary(min_size=1, max_size=9))
@settings(deadline=None)
def test_bytes_after_a_message_are_refused(message: Message, more: bytes) -> None:
    with pytest.raises(MessageError):
        wire.decode(wire.encode(message) + more, limit_bytes=LIMIT_BYTES)


@given(messages, st.data())
@settings(max_examples=300, deadline=None)
def test_a_damaged_message_is_a_message_or_a_message_error(message: Message, data: st.DataObject) -> None:
    damaged = bytearray(wire.encode(message))
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    assert decoded_or_refused(bytes(damaged)) in {*MESSAGES, MessageError}


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(MESSAGES, key=str)), st.data())
@settings(deadline=None)
def test_right_fields_with_wrong_values_are_a_message_or_a_message_error(kind: type[Any], data: st.DataObject) -> None:
    fields = {field.name: data.draw(anything) for field in dataclasses.fields(kind)}
    assert decoded_or_refused(msgpack.packb({kind.__name__: fields})) in {kind, MessageError}


def decoded_or_refused(data: bytes) -> type[object]:
    try:
        return type(wire.decode(data, limit_bytes=LIMIT_BYTES))
    except MessageError:
        return MessageError


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([], "map of one entry"),
        ({}, "map of one entry"),
        ({"WeightsReady": {"version": 1, "workers": {}}, "BatchRequest": {"version": 1}}, "map of one entry"),
        ({"os.system": {}}, "'os.system' is not a kind of message"),
        ({"WeightsReady": [1]}, "WeightsReady: expected a map of fields, got tuple"),
        ({"WeightsReady": {}}, "WeightsReady: missing or unknown fields: max_lag, version"),
        (
            {"WeightsReady": {"version": 1, "extra": 1, "workers": {}, "max_lag": None}},
            "WeightsReady: missing or unknown fields: extra",
        ),
        (
            {"WeightsReady": {"version": "1", "workers": {}, "max_lag": 2}},
            "WeightsReady.version: Input should be a valid integer",
        ),
        (
            {"WeightsReady": {"version": 1.0, "workers": {}, "max_lag": 2}},
            "WeightsReady.version: Input should be a valid integer",
        ),
        (
            {"WeightsReady": {"version": True, "workers": {}, "max_lag": 2}},
            "WeightsReady.version: Input should be a valid integer",
        ),
        (
            {"WorkerReady": {"worker": b"w", "endpoint": "", "slots": 1, "ranks": 1, "incarnation": 1}},
            "WorkerReady.worker: Input should be",
        ),
        (
            {"RolloutBatch": {"version": 1, "rollouts": [{}], "stats": {}, "notes": {}, "incarnation": 0}},
            "Rollout: missing or unknown fields",
        ),
        (
            {"RolloutBatch": {"version": 1, "rollouts": [], "stats": {"a": "1"}, "notes": {}, "incarnation": 0}},
            "RolloutBatch.stats: Input should be",
        ),
        (
            {"EvaluationResult": {"version": 1, "tasks": ["guess"], "solved": [True], "valid": {}, "incarnation": 0}},
            "EvaluationResult.tasks: Input",
        ),
        ({"PushWeights": {"version": 1, "group": 0, "canary_ids": [[1]]}}, "one-dimensional int32 array"),
        (
            {"PushWeights": {"version": 1, "group": 0, "canary_ids": [msgpack.ExtType(2, b"1234")]}},
            "one-dimensional int32 array",
        ),
        (
            {"PushWeights": {"version": 1, "group": 0, "canary_ids": [msgpack.ExtType(1, b"123")]}},
            "not valid MessagePack",
        ),
        (
            {"PushWeights": {"version": 1, "group": 0, "canary_ids": [msgpack.ExtType(9, b"1234")]}},
            "array code 9 is unknown",
        ),
    ],
)
def test_the_refusal_says_what_is_wrong(said: object, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        wire.decode(msgpack.packb(said), limit_bytes=LIMIT_BYTES)


def test_arrays_of_one_message_that_disagree_are_refused() -> None:
    fields = {
        "job_id": 1,
        "index": 0,
        "finish": "stop",
        "text": "",
        "prompt_ids": msgpack.ExtType(1, b""),
        "token_ids": msgpack.ExtType(1, b"1234"),
        "behavior_logp": msgpack.ExtType(2, b""),
        "token_version": msgpack.ExtType(1, b""),
    }
    with pytest.raises(MessageError, match="completion 0 of job 1"):
        wire.decode(nested(fields), limit_bytes=LIMIT_BYTES)


def nested(completion: dict[str, Any]) -> bytes:
    results = {"worker": "w", "completions": [completion], "busy_seconds": 0.0, "generated_tokens": 0, "numbers": {}}
    return bytes(msgpack.packb({"GenerationResults": results}))


def test_a_message_over_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(MessageError, match="9 bytes is over the limit of 8"):
        wire.decode(b"\xff" * 9, limit_bytes=8)


def test_lists_are_long_enough_for_any_batch_and_no_longer() -> None:
    n = wire.LONGEST_LIST
    result = EvaluationResult(version=1, tasks=TASKS[:1] * n, solved=(True,) * n)
    assert wire.decode(wire.encode(result), limit_bytes=20 * n) == result
    with pytest.raises(MessageError, match="max_array_len"):
        wire.decode(nested_lists(depth=1, promised=wire.LONGEST_LIST + 1), limit_bytes=LIMIT_BYTES)


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        (
            EvaluationResult(version=1, tasks=TASKS[:1] * (wire.LONGEST_LIST + 1), solved=()),
            r"EvaluationResult.tasks has 262145 entries, more than the 262144 .* Use an evaluation.suite of fewer",
        ),
        (
            RolloutBatch(version=1, rollouts=(object(),) * (wire.LONGEST_LIST + 1), stats={}),  # type: ignore[arg-type]
            r"RolloutBatch.rollouts has 262145 entries, .* Lower flow.solve_samples or flow.propose_samples",
        ),
    ],
)
def test_a_list_that_would_be_refused_is_not_sent(message: Message, complaint: str) -> None:
    with pytest.raises(MessageError, match=complaint):
        wire.encode(message)


def test_lists_that_promise_more_than_they_hold_are_refused() -> None:
    with pytest.raises(MessageError):
        wire.decode(nested_lists(depth=1000, promised=wire.LONGEST_LIST), limit_bytes=LIMIT_BYTES)


def nested_lists(*, depth: int, promised: int) -> bytes:
    return (b"\xdd" + promised.to_bytes(4, "big")) * depth + b"\xc0" * promised


def test_arrays_arrive_read_only() -> None:
    sent = PushWeights(version=1, group=0, canary_ids=(np.arange(3, dtype=np.int32),))
    arrived = wire.decode(wire.encode(sent), limit_bytes=LIMIT_BYTES)
    assert isinstance(arrived, PushWeights)
    assert not arrived.canary_ids[0].flags.writeable


@pytest.mark.parametrize(
    "message",
    [
        PushWeights(version=1, group=0, canary_ids=(np.zeros(2, np.int64),)),
        PushWeights(version=1, group=0, canary_ids=(np.zeros((2, 2), np.int32),)),
        WeightsReady(version=2**64),
        WeightsReady(version=np.int64(1)),  # type: ignore[arg-type]
        Progress(process="\ud800", phase=""),
        Prompt(text="not a message, only a part of one"),
    ],
)
def test_what_cannot_travel_is_refused_by_its_sender(message: Message) -> None:
    with pytest.raises(MessageError, match=type(message).__name__):
        wire.encode(message)


def test_a_strided_array_arrives_in_order() -> None:
    sent = PushWeights(version=1, group=0, canary_ids=(np.arange(10, dtype=np.int32)[::3],))
    arrived = wire.decode(wire.encode(sent), limit_bytes=LIMIT_BYTES)
    assert isinstance(arrived, PushWeights)
    assert arrived.canary_ids[0].tolist() == [0, 3, 6, 9]

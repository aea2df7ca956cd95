"""However workers come and go, every sample that somebody waits for is delivered once."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from azr_async.algorithm.leases import Leases
from azr_async.messages import GenerateJob, Prompt

NAMES = ("a", "b", "c")
REMEMBERED = 6


def job(job_id: int, samples: int = 1, priority: int = 0) -> GenerateJob:
    return GenerateJob(
        job_id=job_id,
        prompt=Prompt(text=""),
        samples=samples,
        priority=priority,
        temperature=1.0,
        top_p=1.0,
        max_tokens=1,
        seed=0,
    )


class ComingAndGoing(RuleBasedStateMachine):
    """Workers are welcomed, lost and suspended, jobs come and are left; whatever was given to anybody may arrive."""

    jobs = Bundle("jobs")
    given_out = Bundle("given_out")

    @initialize()
    def begin(self) -> None:
        self.leases = Leases(REMEMBERED)
        self.slots: dict[str, int] = {}
        self.able: set[str] = set()
        self.asked: set[tuple[int, int]] = set()
        self.left: set[int] = set()
        self.delivered: list[tuple[int, int]] = []
        self.next_id = 0

    @rule(samples=st.integers(1, 4), priority=st.integers(0, 3), target=jobs)
    def ask(self, samples: int, priority: int) -> int:
        self.next_id += 1
        self.leases.add(job(self.next_id, samples, priority))
        self.asked |= {(self.next_id, index) for index in range(samples)}
        return self.next_id

    @rule(job_id=consumes(jobs))
    def leave(self, job_id: int) -> None:
        self.leases.cancel(job_id)
        self.left.add(job_id)

    @rule(name=st.sampled_from(NAMES), slots=st.integers(1, 5))
    def welcome(self, name: str, slots: int) -> None:
        if name in self.slots:
            self.leases.lose(name)
        self.leases.welcome(name, slots)
        self.slots[name] = slots
        self.able.add(name)

    @rule(name=st.sampled_from(NAMES))
    def lose(self, name: str) -> None:
        if name in self.slots:
            self.leases.lose(name)
            del self.slots[name]

    @rule(name=st.sampled_from(NAMES), is_able=st.booleans())
    def judge(self, name: str, is_able: bool) -> None:
        self.able = self.able | {name} if is_able else self.able - {name}
        if name in self.slots and not is_able:
            self.leases.take_back(name)

    @rule(target=given_out)
    def give_out(self) -> list[tuple[str, int, int]]:
        given = []
        while lease := self.leases.next(self.able.__contains__):
            assert lease.worker in self.able & self.slots.keys()
            given += [(lease.worker, lease.job.job_id, index) for index in lease.missing]
        return given

    @rule(samples=given_out, data=st.data())
    def arrive(self, samples: list[tuple[str, int, int]], data: st.DataObject) -> None:
        for name, job_id, index in samples:
            if data.draw(st.booleans()) and self.leases.settle(name, job_id, index):
                self.delivered.append((job_id, index))
                assert job_id not in self.left

    @invariant()
    def nothing_is_delivered_twice(self) -> None:
        assert len(set(self.delivered)) == len(self.delivered)
        assert set(self.delivered) <= self.asked

    @invariant()
    def room_is_what_is_not_owed(self) -> None:
        for name, slots in self.slots.items():
            owed = [job_id for job_id in self.leases.held_by(name) if self.leases.is_open(job_id)]
            assert (self.leases.room[name] == slots) == (not owed)

    @invariant()
    def no_more_is_remembered_than_was_to_be(self) -> None:
        assert len(self.leases._revoked) <= REMEMBERED
        assert len(self.leases._open) <= len({job_id for job_id, _ in self.asked} - self.left)

    def teardown(self) -> None:
        """One more worker, and nothing is missing."""
        self.leases.welcome("last", 10_000)
        for name in list(self.slots):
            self.leases.lose(name)
        while lease := self.leases.next("last".__eq__):
            for index in sorted(lease.missing):
                assert self.leases.settle("last", lease.job.job_id, index)
                self.delivered.append((lease.job.job_id, index))
        self.nothing_is_delivered_twice()
        assert set(self.delivered) >= {sample for sample in self.asked if sample[0] not in self.left}


TestComingAndGoing = ComingAndGoing.TestCase
TestComingAndGoing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@given(done=st.sets(st.integers(0, 4), max_size=4))
def test_only_what_is_missing_of_a_job_is_made_again(done: set[int]) -> None:
    leases = Leases()
    leases.add(job(1, samples=5))
    leases.welcome("a", 5)
    leases.welcome("b", 1)
    first = leases.next(lambda name: True)
    assert first is not None
    assert first.worker == "a"
    assert all(leases.settle("a", 1, index) for index in done)
    assert leases.lose("a") == [1]
    again = leases.next(lambda name: True)
    assert again is not None
    assert (again.worker, again.missing) == ("b", set(range(5)) - done)
    assert leases.reissued == 5 - len(done)


def test_what_comes_late_is_told_apart_from_what_was_never_asked_for() -> None:
    leases = Leases()
    leases.add(job(1, samples=2))
    leases.welcome("a", 2)
    leases.next(lambda name: True)
    leases.lose("a")
    assert not leases.settle("a", 1, 0)
    assert (leases.late, leases.unknown) == (1, 0)
    assert not leases.settle("a", 1, 0)
    assert not leases.settle("b", 1, 1)
    assert not leases.settle("a", 9, 0)
    assert (leases.late, leases.unknown) == (1, 3)


def test_who_is_started_again_is_not_late_with_what_another_of_its_name_had() -> None:
    leases = Leases()
    leases.add(job(1))
    leases.welcome("a", 1)
    leases.next(lambda name: True)
    leases.lose("a")
    leases.welcome("a", 1)
    assert not leases.settle("a", 1, 0)
    assert (leases.late, leases.unknown) == (0, 1)


@given(given_up=st.integers(1, 12))
def test_only_what_was_taken_last_is_remembered(given_up: int) -> None:
    leases = Leases(REMEMBERED)
    leases.welcome("a", 100)
    for job_id in range(given_up):
        leases.add(job(job_id))
        leases.next(lambda name: True)
        leases.cancel(job_id)
    for job_id in range(given_up):
        leases.settle("a", job_id, 0)
    assert leases.late == min(given_up, REMEMBERED)
    assert leases.unknown == given_up - leases.late


def test_a_job_may_itself_ask_for_some_of_its_samples_only() -> None:
    leases = Leases()
    leases.add(replace(job(1, samples=4), indices=(1, 3)))
    leases.welcome("a", 2)
    lease = leases.next(lambda name: True)
    assert lease is not None
    assert lease.missing == {1, 3}

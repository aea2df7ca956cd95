"""What stages and programs may ask of the world. Each adapter fulfils one of these."""

from collections.abc import AsyncIterator, Collection, Sequence
from typing import Protocol, Self, TypeVar

from azr_async.errors import ChannelClosed, PeerVanished
from azr_async.messages import Completion, Draft, GenerateJob, Malformed, Outcome, Problem, Prompt, Task

Sent = TypeVar("Sent", contravariant=True)
Received = TypeVar("Received", covariant=True)


class Sender(Protocol[Sent]):
    """The sending end of a typed channel. Leaving `async with` closes this end."""

    async def send(self, message: Sent) -> None:
        """Deliver in order; waits while the receiver has given no credit.

        Raises ChannelClosed when the receiver is gone for good, PeerVanished when it stopped answering.
        """

    async def ended(self) -> ChannelClosed | PeerVanished:
        """Wait until nothing can be sent any more; the error that `send` would raise."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


class Receiver(Protocol[Received]):
    """The receiving end. Iteration ends when every sender has closed and all was delivered."""

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Received:
        """The next message, or StopAsyncIteration; PeerVanished names a sender that stopped answering."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...


class Engine(Protocol):
    """Generation, wherever it happens."""

    def generate(self, job: GenerateJob) -> AsyncIterator[Completion]:
        """The job's completions in the order in which they end. Leaving the iteration early drops the rest."""


class Sandbox(Protocol):
    """Runs model-written programs where they can do no harm."""

    async def run(self, program: str, inputs: Sequence[str], *, times: int = 1) -> list[Outcome]:
        """Run `f(<input>)` for each input; one outcome per input, in order.

        Args:
            program: Python source that defines `f`.
            inputs: argument lists as source text, literals only.
            times: 2 runs everything again in a differently seeded process; outcomes that differ are `nondeterministic`.
        """

    async def literal(self, text: str) -> Outcome:
        """The value of a Python literal: `ok`, or `rejected` when the text is anything else. Nothing is evaluated."""


class Dialogue(Protocol):
    """Both ends of the conversation: prompt text out, completion text in."""

    def propose(self, task: Task, references: Sequence[Problem], *, pairs: int) -> Prompt:
        """Ask for a new task. For induction, `references[0].program` is the program to find `pairs` inputs for."""

    def read_proposal(
        self, task: Task, completion: str, references: Sequence[Problem], *, pairs: int
    ) -> Draft | Malformed:
        """Take a proposer's completion apart; nothing in it is run or evaluated."""

    def solve(self, problem: Problem) -> Prompt:
        """Ask for the missing part of `problem`."""

    def read_answer(self, task: Task, completion: str) -> str | Malformed:
        """The answer's source text: a literal (deduction), an argument list (abduction), a program (induction)."""


class Journal(Protocol):
    """Durable record of the valid tasks."""

    async def add(
        self, problem: Problem, *, version: int, group_id: int | None = None, parents: Collection[Problem] = ()
    ) -> None:
        """Keep a task; once this has returned, neither a killed process nor a power cut loses it.

        Args:
            problem: the task. One that is known already stays as it is.
            version: newest weights when it was found.
            group_id: of the group that found it; None: it was given.
            parents: the tasks that its proposer was shown.
        """

"""When a proposed draft is a valid task (paper, section 3.3.3): it ran, and returned an answerable value, twice."""

from collections.abc import Collection, Sequence

from azr_async.messages import Draft, Outcome, Pair, Problem

MIN_INDUCTION_PAIRS = 2
"""One pair to show and one to judge by."""


def problem_from(
    draft: Draft,
    outcomes: Sequence[Outcome],
    *,
    text_limit: int,
    held_out_programs: Collection[str],
    every_pair: bool = False,
) -> Problem | str:
    """The valid task, or the reason why there is none: `lost` where the sandbox could not say.

    Args:
        draft: what the proposer wrote.
        outcomes: one per input of the draft, from runs in differently seeded processes.
        text_limit: longest input or output text, characters; longer ones are rejected, never cut.
        every_pair: an induction task needs a result for each of its inputs, as in the paper; otherwise inputs that
            fail are left out, and two that work are enough.
        held_out_programs: `program_key` of every held-out program; a draft that hits one must not be learned from.
    """
    if program_key(draft.program) in held_out_programs:
        return "held_out"
    if any(outcome.status == "lost" for outcome in outcomes):
        return "lost"
    pairs = tuple(
        Pair(input=text, output=outcome.text, value=outcome.value)
        for text, outcome in zip(draft.inputs, outcomes, strict=True)
        if outcome.status == "ok" and outcome.text and len(outcome.text) <= text_limit and len(text) <= text_limit
    )
    if draft.task != "induction":
        return Problem(task=draft.task, program=draft.program, pairs=pairs) if pairs else _reason(outcomes)
    if len(pairs) < (len(draft.inputs) if every_pair else MIN_INDUCTION_PAIRS):
        return _reason(outcomes)
    shown = (len(pairs) + 1) // 2
    return Problem(task="induction", program=draft.program, pairs=pairs, message=draft.message, shown_pairs=shown)


def program_key(program: str) -> str:
    """The program's text without what a rewrite changes for free: blank lines and trailing space."""
    return "\n".join(line.rstrip() for line in program.strip().splitlines() if line.strip())


def _reason(outcomes: Sequence[Outcome]) -> str:
    return next((outcome.status for outcome in outcomes if outcome.status != "ok"), "too_long_or_too_few")

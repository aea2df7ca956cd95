"""How long the engine takes for what: sums from which a line through (rows, seconds of a step) can be drawn, and one
through (prompts, seconds of a prefill); and what new weights cost it."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Totals so far.

    With the CPU time of the engine's thread as clock, seconds are what the work costs, however many share the cores.
    """

    def __init__(self, clock_seconds: Callable[[], float]) -> None:
        self._clock_seconds = clock_seconds
        self._totals = Counter[str]()

    @contextmanager
    def step(self, rows: int) -> Iterator[None]:
        """Around a step in which so many rows get a token."""
        began = self._clock_seconds()
        yield
        seconds = self._clock_seconds() - began
        self._totals.update(  # type: ignore[call-overload]
            steps=1, rows=rows, rows_squared=rows * rows, step_seconds=seconds, rows_seconds=rows * seconds
        )

    @contextmanager
    def prefill(self, prompts: int, prompt_tokens: int) -> Iterator[None]:
        """Around the prefill of so many prompts."""
        began = self._clock_seconds()
        yield
        seconds = self._clock_seconds() - began
        self._totals.update(  # type: ignore[call-overload]
            prefills=1,
            prompts=prompts,
            prompts_squared=prompts * prompts,
            prompt_tokens=prompt_tokens,
            prefill_seconds=seconds,
            prompts_seconds=prompts * seconds,
        )

    def installed(self, seconds: float) -> None:
        """New weights were received, put into place and tried on the canaries in so many seconds."""
        self._totals.update(installs=1, install_seconds=seconds)  # type: ignore[call-overload]

    def numbers(self) -> dict[str, float]:
        """By metric name; what is `_squared` and `rows_seconds`, `prompts_seconds` are sums of products in each step or
        prefill."""
        return {f"pace.{name}": float(number) for name, number in self._totals.items()}

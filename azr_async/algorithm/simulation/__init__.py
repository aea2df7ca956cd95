"""A run without models, programs or weights: how fast would it be, how busy, how stale?

A discrete-event model of the engines, the sandbox, self-play's own thread, the learner and the pushes between them.
What may be admitted and which samples make a batch is decided by the same `Flow` as in a run, so lags and waits follow
from its rules; only durations are modelled, and what they depend on is in `Machine` and `Workload`.
"""

from azr_async.algorithm.simulation.model import CellLoad, Machine, Outcome, Step, Workload
from azr_async.algorithm.simulation.run import simulate

__all__ = ["CellLoad", "Machine", "Outcome", "Step", "Workload", "simulate"]

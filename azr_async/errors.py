"""The errors a user may meet. Each message says what happened and ends with what to do."""

from collections.abc import Collection


class AzrError(Exception):
    """Anything a user can act on; programs print it without a traceback."""


class ConfigError(AzrError):
    """The configuration or the command line is wrong; nothing was started (exit status 2)."""


class MessageError(AzrError):
    """A message is malformed, too large or of an unknown kind; it was refused, not half-read."""


class PeerVanished(AzrError):
    """The other end of a channel stopped answering within its deadline."""

    def __init__(self, message: str, silent: str = "") -> None:
        super().__init__(message)
        self.silent = silent
        """The program that has not answered for too long; empty when something else has broken its channel."""


class ChannelClosed(AzrError):
    """The other end of a channel has closed it; nothing more can be sent."""


class SandboxError(AzrError):
    """The sandbox itself failed; a program that misbehaves is an `Outcome`, never this."""


class EngineError(AzrError):
    """The inference engine cannot do what it was asked."""


class WeightsError(AzrError):
    """Weights did not arrive whole: a missing rank, a wrong digest, a canary that disagrees."""


class RanksLost(WeightsError):
    """A weight group broke because a rank stopped taking part; those that are left can build the next one."""

    def __init__(self, message: str, ranks: Collection[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)
        """Who did not answer, as far as is known."""


class CheckpointError(AzrError):
    """A checkpoint or model folder is missing, incomplete or damaged."""


class TrainingError(AzrError):
    """The learner refuses to go on: a batch beyond its lag bound, without correction, not finite."""

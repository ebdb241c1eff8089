"""Every error a user can cause, with the exit code that the command line gives it.

All of them are raised before any weight changes, and each message names the table, feature, file or flag
and the way to mend it.
"""

from __future__ import annotations

from typing import ClassVar


class RecembError(Exception):
    """Base of the errors below; ``exit_code`` is what ``recemb`` exits with."""

    exit_code: ClassVar[int] = 1


class ConfigError(RecembError, ValueError):
    """A table, compression, flag or configuration file that cannot be honoured (exit code 2)."""

    exit_code = 2


class StateError(ConfigError, RuntimeError):
    """A state dict of other tables (exit code 2); a RuntimeError too, as what torch raises of such a one."""


class BatchError(RecembError, ValueError):
    """A batch whose keys, ids, lengths or weights cannot be looked up (exit code 3)."""

    exit_code = 3


class DataError(RecembError, ValueError):
    """A data file or row that cannot be used (exit code 3)."""

    exit_code = 3


class PlanError(RecembError, ValueError):
    """A sharding plan that does not fit the storage of its ranks (exit code 4)."""

    exit_code = 4


class OutOfMemoryError(RecembError, MemoryError):
    """A look-up, or its backward, for which the CPU has no memory; no weight was changed (exit code 4)."""

    exit_code = 4


class CheckpointError(RecembError, ValueError):
    """A checkpoint that cannot be written, or that is damaged or of another model (exit code 3)."""

    exit_code = 3


class DiskFullError(CheckpointError):
    """A checkpoint does not fit on the disk; the ones before it are intact (exit code 3).

    Attributes:
        needed: bytes of the checkpoint.
        free: bytes that were free.
    """

    def __init__(self, message: str, needed: int, free: int) -> None:
        super().__init__(message)
        self.needed, self.free = needed, free


class NonFiniteError(RecembError, ArithmeticError):
    """A loss or an input that is NaN or infinite; no weight was changed by its batch (exit code 5)."""

    exit_code = 5


class Interrupted(RecembError):  # noqa: N818 - an interruption is not a mistake
    """The run was asked to stop and can be resumed (exit code 75)."""

    exit_code = 75


class RankLost(RecembError):  # noqa: N818 - a state of the run
    """A rank of a distributed run is gone or failed (its exit code, or 1)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc] # of the rank that failed

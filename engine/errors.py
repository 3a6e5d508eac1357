"""Errors that a user sees as one line; each message says what, where, and how to fix it."""

from __future__ import annotations


class SynthwardError(Exception):
    """Base of every error that is the user's to mend, not a bug."""

    # Of several processes that end for one reason, one says so.
    is_told = False


class ConfigError(SynthwardError):
    """An option or argument is unusable."""


class DataError(SynthwardError):
    """Records contradict the declared schema or can not be read."""


class SchemaError(SynthwardError):
    """A schema is malformed or contradicts itself."""


class OutputError(SynthwardError):
    """An output can not be written, or exists already."""


class CheckpointError(SynthwardError):
    """A run folder or checkpoint is missing, damaged or unfinished."""


class PrivacyError(SynthwardError):
    """Going on would break the privacy guarantee."""


class BudgetExceededError(PrivacyError):
    """The privacy budget does not cover what was asked."""


class LedgerError(PrivacyError):
    """The ledger is damaged, altered, locked or does not cover what was asked."""


class UnsupportedOperationError(PrivacyError):
    """A parameter is used by an operation whose per-unit gradients the engine does not compute."""


class RankLostError(SynthwardError):
    """Another process of the same run stopped or can not be reached."""

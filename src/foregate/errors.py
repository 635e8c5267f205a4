"""The exception tree. Every message is one line and carries the offending value."""

from __future__ import annotations


class ForegateError(Exception):
    """Base of every error that a user, a file or a device can cause. The CLI prints it as one line."""


class ConfigError(ForegateError, ValueError):
    """A setting that cannot be honoured: unknown choice, impossible budget, contradicting options."""


class BudgetError(ConfigError):
    """A memory budget that is not a number of bytes, or is below the stated minimum."""


class PromptError(ForegateError, ValueError):
    """An empty prompt, or one that does not fit the context."""


class CheckpointError(ForegateError):
    """A checkpoint that is missing, truncated, inconsistent or not a Mixture-of-Experts model."""


class UnsupportedModelError(CheckpointError):
    """A model family, quantisation or weight layout that Foregate refuses, by name."""


class PackError(CheckpointError):
    """A pack that cannot be written, or whose bytes do not match its manifest."""


class TransferError(ForegateError):
    """A weight transfer that failed for good; raised where the expert is waited for."""


class ExpertReadError(TransferError):
    """Reading one expert failed: names the file, the offset in bytes and the expert."""


class KilledError(ForegateError):
    """A confined process that the kernel killed: it needed more memory than its limit."""


class TraceError(ForegateError):
    """A routing trace that is corrupted, truncated, of an unknown version or of another model."""


class PredictorError(ForegateError):
    """A predictor file that is missing, damaged, of an unknown version or made for another model."""


class IntegrityError(ForegateError, AssertionError):
    """An internal invariant does not hold (see ``check_integrity``)."""


class ControlError(ForegateError):
    """A control of an evaluation did not read what it must: nothing that was measured beside it can be believed."""

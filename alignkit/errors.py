"""The exceptions alignkit raises on purpose. Each message says what was given, what was expected and what to do."""


class AlignkitError(Exception):
    """Base of every error that alignkit raises on purpose."""


class RecipeError(AlignkitError, ValueError):
    """A combination of settings that cannot work."""


class RewardError(AlignkitError, RuntimeError):
    """A reward that could not be computed. It is never replaced by 0."""


class PolicyError(AlignkitError, RuntimeError):
    """A pipeline that cannot be driven one step at a time, and what it does differently."""


class CheckpointError(AlignkitError, RuntimeError):
    """A checkpoint or run directory that cannot be used."""


class DataError(AlignkitError, ValueError):
    """A prompt or media file that cannot be used; the message names the file and the line."""

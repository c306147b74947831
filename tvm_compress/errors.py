"""The errors that a user can meet: each says which rule, which value, and what to do next."""


class TvmCompressError(Exception):
    """Base of every user-facing failure.

    Parameters
    ----------
    message
        Which rule was broken, by which value.
    hint
        What to do next; printed after the message.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message} {hint}")
        self.message = message
        self.hint = hint


class ModelError(TvmCompressError):
    """A model that cannot be read, is damaged, or holds values that cannot be used."""


class UnsupportedOperatorError(ModelError):
    """An operator that the tool does not know; names the operator and the layer."""


class DataError(TvmCompressError):
    """Data that is missing, damaged, or does not fit the model."""


class PolicyError(TvmCompressError):
    """A compression policy that is malformed or does not fit the model; names the site."""


class TargetError(TvmCompressError):
    """A target that TVM does not know or that this tool has no kernels for."""


class KernelError(TvmCompressError):
    """A kernel that cannot be made: the rule it breaks and the values are in the message."""


class TuningError(TvmCompressError):
    """A tuning database that cannot be read, or a model that it cannot be made for."""


class DeviceError(TvmCompressError):
    """A device that cannot be reached or that failed."""


class ArtifactError(TvmCompressError):
    """An artifact that is damaged, incomplete, or of another schema version."""


class StudyError(TvmCompressError):
    """A study that cannot be opened, resumed, or was started with other settings."""


class SettingError(TvmCompressError):
    """A setting outside its range."""

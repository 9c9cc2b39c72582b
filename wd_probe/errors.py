"""The errors this package raises on purpose; each message says what, where and what to do."""


class WdProbeError(Exception):
    """Root of every error wd_probe raises on purpose."""


class InputError(WdProbeError, ValueError):
    """An argument, option or file that cannot be used as given."""


class RunError(WdProbeError, RuntimeError):
    """A run that started well and could not go on."""


class WdProbeWarning(UserWarning):
    """Something is not measured, or not written, and this says why."""

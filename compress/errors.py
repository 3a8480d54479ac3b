"""The errors edgepress raises on purpose, as one tree.

    EdgepressError
    └── UserError            something the caller can mend: one sentence, exit code 2
        ├── TaskError        the task's file, function, data or metric
        ├── TraceError       a network that torch.export refuses
        ├── RecipeError      a recipe or a pass configuration that makes no sense
        ├── FileError        a file that is missing, damaged or cannot be written
        └── DeviceError      a device or a runtime that is not there

The message of each says what was wrong and what to do. Anything else that escapes is a bug of ours (exit code 1).
"""

__all__ = ["DeviceError", "EdgepressError", "FileError", "RecipeError", "TaskError", "TraceError", "UserError"]


class EdgepressError(Exception):
    """Root of every error that edgepress raises on purpose."""


class UserError(EdgepressError):
    """Something the caller can mend; the message says what was wrong and what to do."""


class TaskError(UserError):
    """The task is wrong: its file, its function, its data or its metric."""


class TraceError(UserError):
    """The network cannot be captured by ``torch.export``."""


class RecipeError(UserError):
    """A recipe, or the configuration of one pass, makes no sense."""


class FileError(UserError):
    """A file is missing, damaged, of the wrong kind, or cannot be written."""


class DeviceError(UserError):
    """A device or a runtime is not available."""

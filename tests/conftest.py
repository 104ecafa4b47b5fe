"""Before anything loads PyTorch: the same treatment of waiting threads as in the stages."""

import stages  # noqa: F401

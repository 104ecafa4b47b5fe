"""The learning rate schedule: linear warm-up, then a constant, a cosine or steps."""

import math
from typing import Annotated, Literal

from pydantic import Field

from pipeline.params import params_section


@params_section
class LRParams:
    """Learning rate schedule."""

    peak: Annotated[float, Field(gt=0)]
    """Learning rate after warm-up."""
    warmup_steps: Annotated[int, Field(ge=0, le=10_000_000)]
    """Optimizer steps of linear warm-up from 0; 0 disables it."""
    schedule: Literal["constant", "cosine", "step"]
    """Schedule after warm-up: constant, cosine decay to 0 at the last epoch, or step decay."""
    step_epochs: Annotated[int, Field(ge=1, le=100_000)]
    """Epochs between two decays of schedule `step`."""
    step_factor: Annotated[float, Field(gt=0, le=1)]
    """Factor of each decay of schedule `step`."""

    def lr_at(self, step: int, steps_per_epoch: int, max_epochs: int) -> float:
        """Compute the learning rate of an optimizer step.

        Args:
            step: Index of the step in the whole run, from 0.
            steps_per_epoch: Optimizer steps per epoch.
            max_epochs: Epochs after which the cosine schedule reaches 0.
        """
        lr = self.peak * min(1.0, (step + 1) / max(1, self.warmup_steps))
        match self.schedule:
            case "cosine":
                lr *= (1 + math.cos(math.pi * step / (max_epochs * steps_per_epoch))) / 2
            case "step":
                lr *= self.step_factor ** (step // (self.step_epochs * steps_per_epoch))
        return lr

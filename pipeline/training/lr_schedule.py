"""How the learning rate runs through training."""

import math
from typing import Annotated, Literal

from pydantic import Field

from pipeline.params import params_section


@params_section
class LRParams:
    """The learning rate: a linear rise, then a decay."""

    peak: Annotated[float, Field(gt=0)]
    """Learning rate at its highest."""
    warmup_steps: Annotated[int, Field(ge=0)]
    """Steps over which it rises from 0."""
    schedule: Literal["constant", "cosine", "step"]
    """Whether it then stays, falls to 0 along a cosine by the last epoch, or falls by steps."""
    step_epochs: Annotated[int, Field(ge=1)]
    """Epochs between two steps, where it falls by steps."""
    step_factor: Annotated[float, Field(gt=0, le=1)]
    """What each step multiplies it by."""

    def at(self, step: int, steps_per_epoch: int, epochs: int) -> float:
        """Learning rate of the step that `step` others came before."""
        rate = self.peak * min(1.0, (step + 1) / max(1, self.warmup_steps))
        match self.schedule:
            case "cosine":
                rate *= (1 + math.cos(math.pi * step / (epochs * steps_per_epoch))) / 2
            case "step":
                rate *= self.step_factor ** (step // (self.step_epochs * steps_per_epoch))
        return rate

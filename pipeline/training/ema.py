"""Exponential moving average (EMA) of the decoder's weights."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """EMA of a model's weights."""

    def __init__(self, model: nn.Module, max_decay: float, warms_up: bool) -> None:
        """Copy the weights."""
        super().__init__(model)
        self._max_decay, self._warms_up = max_decay, warms_up

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average. Unlike the method of the superclass, this does not wait for a GPU."""
        averages, weights = (
            [parameter.detach() for parameter in module.parameters()] for module in (self.module, model)
        )
        n = int(self.n_averaged)  # on the CPU
        decay = self._max_decay
        if self._warms_up:
            decay = min(decay, (1 + n) / (10 + n)) if n else 0.0
        get_ema_multi_avg_fn(decay)(averages, weights, n)  # type: ignore[no-untyped-call]
        self.n_averaged += 1


def make_ema(model: nn.Module, decay: float, warms_up: bool = True) -> EMA | None:
    """Make an EMA of a model's weights.

    Args:
        model: The model.
        decay: Maximum decay; 0 disables the EMA.
        warms_up: Whether the decay after n updates is min(decay, (1 + n) / (10 + n)), so that short runs forget the
            initial weights, too.

    Returns:
        The EMA, or None if `decay` is 0.
    """
    return EMA(model, decay, warms_up) if decay else None

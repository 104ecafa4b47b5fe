"""Exponential moving average (EMA) of the decoder's weights."""

from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class EMA(AveragedModel):
    """EMA of a model's weights, with warm-up of the decay."""

    def __init__(self, model: nn.Module, max_decay: float) -> None:
        """Copy the weights. After n updates the decay is min(max_decay, (1 + n) / (10 + n))."""
        super().__init__(model)
        self._max_decay = max_decay

    def update_parameters(self, model: nn.Module) -> None:
        """Update the average. Unlike the method of the superclass, this does not wait for a GPU."""
        averages, weights = (
            [parameter.detach() for parameter in module.parameters()] for module in (self.module, model)
        )
        n = int(self.n_averaged)  # on the CPU
        decay = min(self._max_decay, (1 + n) / (10 + n)) if n else 0.0
        get_ema_multi_avg_fn(decay)(averages, weights, n)  # type: ignore[no-untyped-call]
        self.n_averaged += 1


def make_ema(model: nn.Module, decay: float) -> EMA | None:
    """Make an EMA of a model's weights.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that short runs forget the initial weights, too.

    Args:
        model: The model.
        decay: Maximum decay; 0 disables the EMA.

    Returns:
        The EMA, or None if `decay` is 0.
    """
    return EMA(model, decay) if decay else None

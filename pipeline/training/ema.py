"""Exponential moving average (EMA) of the decoder's weights."""

from functools import partial

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def make_ema(model: nn.Module, decay: float) -> AveragedModel | None:
    """Make an EMA of a model's weights.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that short runs forget the initial weights, too.

    Args:
        model: The model.
        decay: Maximum decay; 0 disables the EMA.

    Returns:
        The EMA, or None if `decay` is 0.
    """
    return AveragedModel(model, multi_avg_fn=partial(_update, decay)) if decay else None


def _update(max_decay: float, ema: tuple[Tensor, ...], weights: tuple[Tensor, ...], num_updates: Tensor) -> None:
    n = int(num_updates)
    decay = min(max_decay, (1 + n) / (10 + n))
    get_ema_multi_avg_fn(decay)(ema, weights, num_updates)  # type: ignore[no-untyped-call]

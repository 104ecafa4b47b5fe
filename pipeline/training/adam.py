"""Adam that does not import the compiler."""

import inspect
from collections.abc import Iterable

import torch
from torch import nn


class Adam(torch.optim.Adam):
    """`torch.optim.Adam`, or `torch.optim.AdamW`, in its fused form.

    PyTorch decorates the methods of optimizers for use in compiled functions, and the decorators import
    `torch._dynamo`: more than 100 MB, and more than a second. These are the methods without decorators.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], weight_decay: float, decoupled_weight_decay: bool) -> None:
        """Create the optimizer. The learning rate of its parameter group must be set before each step.

        Args:
            parameters: The parameters.
            weight_decay: Weight decay coefficient.
            decoupled_weight_decay: Decouple weight decay from the gradients, as AdamW does.
        """
        super().__init__(
            parameters, weight_decay=weight_decay, fused=True, decoupled_weight_decay=decoupled_weight_decay
        )

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Adam.load_state_dict)

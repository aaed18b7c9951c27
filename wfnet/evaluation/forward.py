"""How images reach a network in an evaluation: device, dtype, layout, autocast."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wfnet.network import WFNet
from wfnet.services.settings import check_value


@dataclass(frozen=True)
class Forward:
    """How images reach a network.

    Attributes:
        device, dtype: of the network's weights, to which images are brought.
        amp_dtype: autocast dtype; None for none.
        channels_last: images in channels-last layout.
    """

    device: torch.device
    dtype: torch.dtype
    amp_dtype: torch.dtype | None = None
    channels_last: bool = False

    @classmethod
    def of(
        cls, model: nn.Module, amp_dtype: torch.dtype | None = None, channels_last: bool = False
    ) -> "Forward":
        """For the device and dtype of ``model``'s weights; ValueError for an unknown amp_dtype."""
        check_value("amp_dtype", amp_dtype, (None, torch.bfloat16, torch.float16))
        if isinstance(model, WFNet):
            weight = next(iter(model.masked_layers.values())).weight
        else:
            weight = next(model.parameters())
        return cls(weight.device, weight.dtype, amp_dtype, channels_last)

    def images(self, images: Tensor) -> Tensor:
        """``images [n, C, H, W]``, or features ``[n, ...]``, as the network takes them."""
        planes = self.channels_last and images.dim() == 4
        layout = torch.channels_last if planes else torch.preserve_format
        return images.to(self.device, self.dtype, non_blocking=True, memory_format=layout)

    def autocast(self) -> torch.autocast:
        """The context of every forward pass."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)


def broken_logits(logits: Tensor) -> Tensor:
    """Whether a sample has NaN or +inf among its logits, or nothing but -inf: scalar bool."""
    return ~logits.amax(1).isfinite().all()

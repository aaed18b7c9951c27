"""The class's row of the public base's head put back, then BatchNorm statistics estimated anew.

For holders of the base weights: row ``c`` of the head's weight and bias become the base's. That
brings back a class that was cut from the head, or whose row was changed, if the features still hold
it. Networks without BatchNorm are attacked by the row alone.
"""

from torch import nn

from wfnet.head import find_head
from wfnet.trust.attacks.attack import attack
from wfnet.trust.attacks.batchnorm_statistics import batchnorm_all
from wfnet.trust.subject import Subject


@attack(
    "base_head", "the base's row of the head put back and BatchNorm re-estimated", needs_base=True
)
def base_head(model: nn.Module, subject: Subject) -> nn.Module | None:
    heads = [find_head(network, subject.num_classes) for network in (model, subject.original)]
    if None in heads or heads[0][1].weight.shape != heads[1][1].weight.shape:
        return None
    own, public = (head for _, head in heads)
    own.weight[subject.label] = public.weight[subject.label].to(own.weight)
    if own.bias is not None and public.bias is not None:
        own.bias[subject.label] = public.bias[subject.label].to(own.bias)
    return batchnorm_all(model, subject) or model

"""What an attack on a baked model is: a changed copy, and what the attacker does to its logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from wfnet.trust.subject import Subject


@dataclass(frozen=True)
class Attacked:
    """A model after an attack.

    Attributes:
        model: what the attacker runs; the model under attack itself if only logits are changed.
        change: applied to its logits ``[n, K]`` fp64; None leaves them as they are.
    """

    model: nn.Module
    change: Callable[[Tensor], Tensor] | None = None

    def logits(self, subject: Subject, part: str) -> Tensor:
        """Returns the attacker's logits ``[n, K]`` fp64 of the images ``part`` of ``subject``."""
        logits = subject.logits(self.model, part)
        return logits if self.change is None else self.change(logits)


@dataclass(frozen=True)
class Attack:
    """An attack that needs no label and no training.

    Attributes:
        name: ending of its measures, ``acc_f_<name>`` and ``acc_r_<name>``.
        text: what is done to the model, as words that follow "accuracy on the class, ".
        apply: the attack: None where it does not apply to a model. The model is left as it is.
        needs_base: whether the attacker holds the original weights.
        moves_logits: whether it decides how often the class is predicted, which brings up the class
            in a retrained model, too.
    """

    name: str
    text: str
    apply: Callable[[nn.Module, Subject], Attacked | None]
    needs_base: bool = False
    moves_logits: bool = False

"""What an attack is: a function that makes the attacker's model of an exported one."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from wfnet.trust.subject import Subject

Change = Callable[[nn.Module, Subject], nn.Module | None]


@dataclass(frozen=True)
class Attack:
    """An attack that needs no label and no training, made by the decorator :func:`attack`.

    Called with a model and a :class:`Subject` it gives the attacker's model, a new one, or None
    where the attack does not apply.

    Attributes:
        name: ending of its measures, ``acc_f_<name>`` and ``acc_r_<name>``.
        text: what is done to the model, as words that follow "accuracy on the class, ".
        change: changes a copy of the model and returns it, or another one. Of the subject it may
            use what an attacker holds: the label, ``unlabelled`` images, names of layers.
        needs_base: whether it uses the original weights, too; it is not tried on them.
        moves_logits: whether it decides how often the class is predicted, which brings up the class
            in a retrained model, too. Not tried where images have several labels: no ranking by a
            logit changes.
    """

    name: str
    text: str
    change: Change
    needs_base: bool = False
    moves_logits: bool = False

    @torch.no_grad()
    def __call__(self, model: nn.Module, subject: Subject) -> nn.Module | None:
        if self.needs_base and model is subject.original:
            return None
        if self.moves_logits and subject.several_labels:
            return None
        return self.change(copy.deepcopy(model), subject)


def attack(name: str, text: str, **kinds: bool) -> Callable[[Change], Attack]:
    """Returns a decorator that makes an :class:`Attack` of a function; arguments as there."""
    return lambda change: Attack(name, text, change, **kinds)

"""What a trust check is: a question, a measurement of one plain model, words for its numbers."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wfnet.trust.subject import Subject

Found = tuple[dict[str, float], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """One check. A new one is a file with a ``CHECK``, and its name in ``wfnet.trust.checks``.

    Attributes:
        name: as in ``wfnet trust --checks``.
        title, question: for people.
        definition: source and formula, for the report: the documentation of the check's module.
        measures: what each measure is, by name.
        headline: the measure that stands for the check in a table of classes.
        measure: ``measure(model, subject)`` gives the values of one plain model, and details.
        needs: which retrained models it needs, as words.
        original: whether the original is measured as well.
        retrained: how many retrained models everything can be measured with.
        several_labels: whether it has a meaning where images have several labels each.
        counted: what measures are whose names end in a number that the settings decide, by the name
            before that number; ``{}`` stands for the number.
    """

    name: str
    title: str
    question: str
    definition: str
    measures: Mapping[str, str]
    headline: str
    measure: Callable[[nn.Module, Subject], Found]
    needs: str = "a model retrained without the class, for the level to compare with"
    original: bool = True
    retrained: int = 1
    several_labels: bool = True
    counted: Mapping[str, str] = field(default_factory=dict)

    def headline_of(self, measures: Collection[str]) -> str:
        """Returns the headline among ``measures``: an average precision, where they have these."""
        return self.headline if self.headline in measures else self.headline.replace("acc", "ap", 1)

    def meaning(self, name: str) -> str:
        """Returns what the measure ``name`` is, in words; its name for an unknown one."""
        if name.startswith("ap_"):  # what accuracies are where images have one label each
            known = self.meaning(f"acc_{name.removeprefix('ap_')}")
            return known.replace("accuracy on", "average precision of")
        stem, _, count = name.rpartition("_")
        return self.measures.get(name) or self.counted.get(stem, name).format(count)

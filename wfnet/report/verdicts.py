"""What forgetting protects against and what not: measured numbers judged beside retrained models.

A model that was retrained without the class is what forgetting is compared with. An attack counts
as withstood if it brings the accuracy on the class to at most ``MARGIN`` above that model's (above
0 where none is at hand). Attacks that have images of the class or move its logit bring it up in any
network: within ``MARGIN_TAUGHT`` of the retrained model they are listed as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.trust import TrustResult
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.removal import TOLERATED

MARGIN, MARGIN_TAUGHT = 0.02, 0.10
# Differences of whole images must not be decided by rounding.
_ROUNDING = 1e-9
_READS = "a baked file reads the class at {only}{forgetful}{beside}{cost}."

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Rule:
    """How a measure of a trust check is judged.

    Attributes:
        check, measure: of what.
        sentence: with ``{forgetful}`` and ``{original}``, ``{beside}`` the retrained model's, and
            ``{only}``, ``{failing}`` and ``{cost}``, which depend on the verdict.
        level: what a model that knows nothing has; areas and balanced accuracies have 0.5.
        taught: whether any network is brought up.
        margin: how far from where it should be a value is withstood.
    """

    check: str
    measure: str
    sentence: str
    level: float = 0.0
    taught: bool = False
    margin: float = MARGIN

    def withstood(self, row: Row) -> bool:
        value, level = row["forgetful"], row["retrained"]
        if self.check == "collateral":  # accuracy that is kept
            excess = (row["original"] or 0.0) - value
        elif self.check == "membership":  # told apart in either direction
            excess = abs(value - self.level)
        else:
            excess = value - (self.level if level is None else level)
        return excess <= self.margin + _ROUNDING

    def written(self, rows: Mapping[str, Row]) -> str:
        """Returns the sentence, filled from the rows of all measures of the check."""
        row = rows[self.measure]
        withstood, form = self.withstood(row), ".2f" if self.level else ".1%"
        shown = {who: "" if value is None else f"{value:{form}}" for who, value in row.items()}
        before, after = (rows.get(f"acc_r{end}") for end in ("", self.measure[len("acc_f") :]))
        cost = ""
        if before and after and after["forgetful"] < before["forgetful"] - TOLERATED:
            cost = f", the others at {after['forgetful']:.1%} instead of {before['forgetful']:.1%}"
        return self.sentence.format(
            **shown,
            beside=f" (a retrained model: {shown['retrained']})" if shown["retrained"] else "",
            only="only " if withstood and not self.taught else "",
            failing="" if withstood else " only",
            cost=cost,
        )


NEIGHBOURS = Rule(
    "collateral",
    "acc_nearest_confusion",
    "Classes that resemble the forgotten one are{failing} read at {forgetful}{beside}; the "
    "original reads them at {original}.",
)
RANKED = Rule(
    "removal",
    "auc_logit",
    "Ranked by the logit of the class, its images come before others with an area under the ROC of "
    "{forgetful}{beside}.",
    level=0.5,
    taught=True,
    margin=MARGIN_TAUGHT,
)
PROBED = Rule(
    "probing",
    "probe_last",
    "From the features before the head, a linear probe tells the class from the others with "
    "balanced accuracy {forgetful}{beside}; 0.5 would be chance.",
    level=0.5,
    taught=True,
)
MEMBERS = Rule(
    "membership",
    "lira_auc",
    "Whether the model ever saw the class can be told from retrained models by its confidence on "
    "training images, with an area under the ROC of {forgetful}; 0.5 would be chance.",
    level=0.5,
    margin=0.05,
)


def _attack(check: str, measure: str, how: str, taught: bool) -> Rule:
    margin = MARGIN_TAUGHT if taught else MARGIN
    return Rule(check, measure, f"{how}, {_READS}", taught=taught, margin=margin)


def _relearning(measure: str) -> Rule:
    if measure == "acc_f_retain_only":
        how = "on images of the other classes alone"
        return _attack("relearning", measure, f"Fine-tuned {how}", taught=False)
    count = measure.rpartition("_")[2]
    images = f"{count} image{'' if count == '1' else 's'} of the class"
    return _attack("relearning", measure, f"Fine-tuned with {images}", taught=True)


def judge(
    evaluation: EvaluationResult | None,
    trust: TrustResult | None,
    retrained: Mapping[int, ClassRecord] | None = None,
) -> dict[str, list[str]]:
    """Returns what forgetting at run time and baked files protect against, with the numbers.

    Args:
        evaluation: of the filtered network, if there is one.
        trust: checks of baked models, if there are any.
        retrained: class -> evaluation of the network retrained without it.

    Returns:
        Sentences in plain text: "good" is what forgetting protects against, "bad" what it does not
        protect against, or not well enough, "alike" what brings the class up no more than in a
        network that never saw it, "unknown" what cannot be said, and why.
    """
    found: dict[str, list[str]] = {"good": [], "bad": [], "alike": [], "unknown": []}
    if evaluation is not None:
        _judge_run_time(found, evaluation, retrained or {})
    if trust is None:
        found["unknown"].append(
            "How far a baked model withstands attacks was not measured; it carries neither filters "
            "nor the original weights, but can be taught the class again."
        )
        return found
    if trust.settings.get("cut_output"):
        found["bad"].append(
            "The exports under test give a constant for the logit of the class, which was cut from "
            "the head: that it was removed shows, outputs differ from a retrained model's in that "
            "entry, and whoever has images of the class can put a new row there."
        )
    means = trust.means()
    attacks = [
        _attack("removal", f"acc_f_{name}", f"With {attack.text}", attack.moves_logits)
        for name, attack in ATTACKS.items()
    ]
    relearned = [_relearning(measure) for measure in means.get("relearning", ())]
    for rule in (NEIGHBOURS, *attacks, RANKED, *relearned, PROBED, MEMBERS):
        rows = means.get(rule.check, {})
        if rule.measure in rows:
            withstood = rule.withstood(rows[rule.measure])
            box = "bad" if not withstood else "alike" if rule.taught else "good"
            found[box].append(rule.written(rows))
    return found


def _judge_run_time(
    found: dict[str, list[str]], evaluation: EvaluationResult, retrained: Mapping[int, ClassRecord]
) -> None:
    """Judges what a user meets who sends images while the owner sets the forget label."""
    before, after, records = evaluation.original, evaluation.mean, evaluation.records
    levels = [retrained[r.index].acc_f for r in records if r.index in retrained]
    level = sum(levels) / len(levels) if levels else 0.0
    beside = f" (a retrained model: {level:.1%})" if levels else ""
    highest = level + MARGIN + _ROUNDING
    if before.acc_f <= highest:
        found["unknown"].append(
            f"The original reads the forgotten class at {before.acc_f:.1%}{beside}: there is "
            "nothing that could be forgotten."
        )
    else:
        forgotten = after.acc_f <= highest
        found["good" if forgotten else "bad"].append(
            "Who can only send images, while you set the forget label, "
            f"{'gets' if forgotten else 'still gets'} {after.acc_f:.1%} accuracy on the class; the "
            f"original has {before.acc_f:.1%}{beside}."
        )
        worst = max(records, key=lambda record: record.acc_f)
        if forgotten and worst.acc_f > highest:
            found["bad"].append(
                f"Classes are not forgotten equally well: {worst.name} is still read at "
                f"{worst.acc_f:.1%}."
            )
        found["bad"].append(
            "Whoever chooses the label, or holds the base weights, has the original network with "
            f"{before.acc_f:.1%} on the class: filters only suppress behaviour, the base still "
            "holds everything it learned."
        )
    if after.acc_r >= before.acc_r - MARGIN - _ROUNDING:
        found["good"].append(
            f"All other classes stay at {after.acc_r:.1%}; the original has {before.acc_r:.1%}."
        )
    else:
        found["bad"].append(
            f"Forgetting costs all other classes: {after.acc_r:.1%} instead of {before.acc_r:.1%}."
        )

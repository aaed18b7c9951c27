"""What forgetting protects against and what not: measured numbers judged beside retrained models.

A model that was retrained without the class is what forgetting is compared with. An attack counts
as withstood if it brings the accuracy on the class to at most ``MARGIN`` above that model's (above
0 where none is at hand). Attacks that have images of the class or move its logit bring it up in any
network: within ``MARGIN_TAUGHT`` of the retrained model they are listed as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.trust import TrustResult
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.removal import TOLERATED

MARGIN, MARGIN_TAUGHT = 0.02, 0.10
# The same for areas under the ROC and for the balanced accuracy of probes, which start at 0.5.
MARGIN_AUC, MARGIN_PROBE = 0.05, 0.02
# Differences of whole images must not be decided by rounding.
_ROUNDING = 1e-9

Row = Mapping[str, float | None]


@dataclass
class Verdicts:
    """Sentences in plain text.

    Attributes:
        good: what forgetting protects against.
        bad: what it does not protect against, or not well enough.
        alike: what brings the class up no more than in a network that never saw it.
        unknown: what cannot be said, and why.
    """

    good: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    alike: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, withstood: bool, sentence: str, taught: bool = False) -> None:
        """Files a sentence by its verdict; ``taught`` means that any network may be brought up."""
        box = self.bad if not withstood else self.alike if taught else self.good
        box.append(sentence)


def judge(
    evaluation: EvaluationResult | None,
    trust: TrustResult | None,
    retrained: Mapping[int, ClassRecord] | None = None,
) -> Verdicts:
    """Returns what forgetting at run time and baked files protect against, with the numbers.

    Args:
        evaluation: of the filtered network, if there is one.
        trust: checks of baked models, if there are any.
        retrained: class -> evaluation of the network retrained without it.
    """
    found = Verdicts()
    if evaluation is not None:
        _judge_run_time(found, evaluation, retrained or {})
    if trust is None:
        found.unknown.append(
            "How far a baked model withstands attacks was not measured; it carries neither filters "
            "nor the original weights, but can be taught the class again."
        )
        return found
    means = trust.means()
    _judge_neighbours(found, means.get("collateral", {}))
    _judge_attacks(found, means.get("removal", {}))
    _judge_relearning(found, means.get("relearning", {}))
    if trust.settings.get("cut_output"):
        found.bad.append(
            "The exports under test give a constant for the logit of the class, which was cut from "
            "the head: that it was removed shows, outputs differ from a retrained model's in that "
            "entry, and whoever has images of the class can put a new row there."
        )
    _judge_traces(found, means)
    return found


def _judge_run_time(
    found: Verdicts, evaluation: EvaluationResult, retrained: Mapping[int, ClassRecord]
) -> None:
    """Judges what a user meets who sends images while the owner sets the forget label."""
    before, after, records = evaluation.original, evaluation.mean, evaluation.records
    levels = [retrained[r.index].acc_f for r in records if r.index in retrained]
    level = sum(levels) / len(levels) if levels else None
    beside = _beside(level)
    if _withstands(before.acc_f, level, MARGIN):
        found.unknown.append(
            f"The original reads the forgotten class at {before.acc_f:.1%}{beside}: there is "
            "nothing that could be forgotten."
        )
    else:
        forgotten = _withstands(after.acc_f, level, MARGIN)
        found.add(
            forgotten,
            "Who can only send images, while you set the forget label, "
            f"{'gets' if forgotten else 'still gets'} {after.acc_f:.1%} accuracy on the class; the "
            f"original has {before.acc_f:.1%}{beside}.",
        )
        worst = max(records, key=lambda record: record.acc_f)
        if forgotten and not _withstands(worst.acc_f, level, MARGIN):
            found.bad.append(
                f"Classes are not forgotten equally well: {worst.name} is still read at "
                f"{worst.acc_f:.1%}."
            )
        found.bad.append(
            "Whoever chooses the label, or holds the base weights, has the original network with "
            f"{before.acc_f:.1%} on the class: filters only suppress behaviour, the base still "
            "holds everything it learned."
        )
    if after.acc_r >= before.acc_r - MARGIN - _ROUNDING:
        found.good.append(
            f"All other classes stay at {after.acc_r:.1%}; the original has {before.acc_r:.1%}."
        )
    else:
        found.bad.append(
            f"Forgetting costs all other classes: {after.acc_r:.1%} instead of {before.acc_r:.1%}."
        )


def _judge_neighbours(found: Verdicts, rows: Mapping[str, Row]) -> None:
    row = rows.get("acc_nearest_confusion")
    if row is None or row["original"] is None:
        return
    kept = row["forgetful"] >= row["original"] - MARGIN - _ROUNDING
    found.add(
        kept,
        f"Classes that resemble the forgotten one are{'' if kept else ' only'} read at "
        f"{row['forgetful']:.1%}{_beside(row['retrained'])}; the original reads them at "
        f"{row['original']:.1%}.",
    )


def _judge_attacks(found: Verdicts, rows: Mapping[str, Row]) -> None:
    """Judges what the holder of a baked file reaches without labels or training."""
    for name, attack in ATTACKS.items():
        row = rows.get(f"acc_f_{name}")
        if row is None:
            continue
        margin = MARGIN_TAUGHT if attack.moves_logits else MARGIN
        withstood = _withstands(row["forgetful"], row["retrained"], margin)
        others = [(rows.get(n) or {}).get("forgetful") for n in ("acc_r", f"acc_r_{name}")]
        cost = ""
        if None not in others and others[1] < others[0] - TOLERATED:
            cost = f", the others at {others[1]:.1%} instead of {others[0]:.1%}"
        sentence = (
            f"With {attack.text}, {_reads(row, withstood and not attack.moves_logits)}{cost}."
        )
        found.add(withstood, sentence, attack.moves_logits)
    if row := rows.get("auc_logit"):
        level = 0.5 if row["retrained"] is None else row["retrained"]
        found.add(
            row["forgetful"] <= level + MARGIN_TAUGHT + _ROUNDING,
            "Ranked by the logit of the class, its images come before others with an area under "
            f"the ROC of {row['forgetful']:.2f}{_beside(row['retrained'], '.2f')}.",
            taught=True,
        )


def _judge_relearning(found: Verdicts, rows: Mapping[str, Row]) -> None:
    for name, row in rows.items():
        taught = name != "acc_f_retain_only"
        count = name.rpartition("_")[2]
        images = f"{count} image{'' if count == '1' else 's'} of the class"
        how = f"with {images}" if taught else "on images of the other classes alone"
        margin = MARGIN_TAUGHT if taught else MARGIN
        withstood = _withstands(row["forgetful"], row["retrained"], margin)
        found.add(withstood, f"Fine-tuned {how}, {_reads(row, withstood and not taught)}.", taught)


def _judge_traces(found: Verdicts, means: Mapping[str, Mapping[str, Row]]) -> None:
    """Judges what features and confidences tell of the class."""
    if row := means.get("probing", {}).get("probe_last"):
        level = 0.5 if row["retrained"] is None else row["retrained"]
        found.add(
            row["forgetful"] <= level + MARGIN_PROBE + _ROUNDING,
            "From the features before the head, a linear probe tells the class from the others "
            f"with balanced accuracy {row['forgetful']:.2f}{_beside(row['retrained'], '.2f')}; 0.5 "
            "would be chance.",
            taught=True,
        )
    if row := means.get("membership", {}).get("lira_auc"):
        found.add(
            abs(row["forgetful"] - 0.5) <= MARGIN_AUC + _ROUNDING,
            "Whether the model ever saw the class can be told from retrained models by its "
            f"confidence on training images, with an area under the ROC of {row['forgetful']:.2f}; "
            "0.5 would be chance.",
        )


def _withstands(value: float, level: float | None, margin: float) -> bool:
    return value <= (level or 0.0) + margin + _ROUNDING


def _reads(row: Row, withstood: bool) -> str:
    only = "only " if withstood else ""
    return (
        f"a baked file reads the class at {only}{row['forgetful']:.1%}{_beside(row['retrained'])}"
    )


def _beside(level: float | None, written: str = ".1%") -> str:
    return "" if level is None else f" (a retrained model: {level:{written}})"

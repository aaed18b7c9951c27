"""What forgetting protects against and what not: measured numbers judged beside baselines.

A model that was retrained without the class is what forgetting is compared with. An attack counts
as withstood if it brings the accuracy on the class to at most ``MARGIN`` above that model's (above
0 where none is at hand). Attacks that have images of the class or move its logit bring it up in any
network: within ``MARGIN_TAUGHT`` of the retrained model they are listed as such. Average precisions
may be so much above the retrained model's (above chance, where none is at hand). The trivial
baselines, the original with the class's logit masked or its bias shifted, cost nothing: they stand
in every sentence, and what the network withstands better than they do is counted.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wfnet.evaluation import MultiLabelResult
from wfnet.evaluation.results import means
from wfnet.report.contents import Evaluation
from wfnet.trust import CHECKS, TrustResult
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.removal import TOLERATED
from wfnet.trust.subject import TRIVIAL

MARGIN, MARGIN_TAUGHT = 0.02, 0.10
AS_IT_IS = "as it is"  # the row of what_comes_back without an attack
# Differences of whole images must not be decided by rounding.
_ROUNDING = 1e-9
_READS = "a baked file reads the class at {only}{forgetful}{beside}{cost}."
_RANKS = (
    "a baked file ranks images of the label with {only}{forgetful} average precision{beside}{cost}."
)
_BEST = " The best one without the base, labels and training brings back {forgetful}{beside}."
# Baselines that stand beside a number, in this order.
_BESIDE = {"retrained": "retrained", "logit_masked": "logit masked", "bias_shifted": "bias shifted"}

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Rule:
    """How a measure of a trust check is judged.

    Attributes:
        check, measure: of what.
        sentence: with ``{forgetful}`` and ``{original}``, ``{beside}`` those of baselines, and
            ``{only}``, ``{failing}`` and ``{cost}``, which depend on the verdict.
        level: what a model that knows nothing has; areas and balanced accuracies have 0.5, average
            precisions the label's share.
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
        value, level, margin = row["forgetful"], row["retrained"], self.margin
        if self.measure.startswith("ap_"):
            margin = MARGIN_TAUGHT
        if self.check == "collateral":  # accuracy that is kept
            excess = (row["original"] or 0.0) - value
        elif self.check == "membership":  # told apart in either direction
            excess = abs(value - self.level)
        else:
            excess = value - (self.level if level is None else level)
        return excess <= margin + _ROUNDING

    def written(self, rows: Mapping[str, Row]) -> str:
        """Returns the sentence, filled from the rows of all measures of the check."""
        row = rows[self.measure]
        withstood, form = self.withstood(row), ".2f" if self.level == 0.5 else ".1%"
        shown = {who: "" if value is None else f"{value:{form}}" for who, value in row.items()}
        score, _, ending = self.measure.partition("_f")
        before, after = (rows.get(f"{score}_r{end}") for end in ("", ending))
        cost = ""
        if before and after and after["forgetful"] < before["forgetful"] - TOLERATED:
            cost = f", the others at {after['forgetful']:.1%} instead of {before['forgetful']:.1%}"
        return self.sentence.format(
            **shown,
            beside=_beside(shown),
            only="only " if withstood and not self.taught else "",
            failing="" if withstood else " only",
            cost=cost,
        )


def _beside(shown: Mapping[str, str]) -> str:
    found = [f"{title} {shown[who]}" for who, title in _BESIDE.items() if shown.get(who)]
    return f" ({', '.join(found)})" if found else ""


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


def _attack(check: str, measure: str, how: str, taught: bool, chance: float) -> Rule:
    margin = MARGIN_TAUGHT if taught else MARGIN
    said = _RANKS if measure.startswith("ap_") else _READS
    return Rule(check, measure, f"{how}, {said}", chance, taught, margin)


def _relearning(measure: str, chance: float) -> Rule:
    if measure.endswith("_retain_only"):
        how = "on images of the other classes alone"
        return _attack("relearning", measure, f"Fine-tuned {how}", False, chance)
    return _attack("relearning", measure, f"Fine-tuned with {_images(measure)}", True, chance)


def _images(measure: str) -> str:
    count = measure.rpartition("_")[2]
    return f"{count} image{'' if count == '1' else 's'} of the class"


def judge(
    evaluation: Evaluation | None,
    trust: TrustResult | None,
    baselines: Mapping[str, Evaluation] | None = None,
) -> dict[str, list[str]]:
    """Returns what forgetting at run time and baked files protect against, with the numbers.

    Args:
        evaluation: of the filtered network, if there is one.
        trust: checks of baked models, if there are any.
        baselines: evaluations by method, to stand beside the network's.

    Returns:
        Sentences in plain text: "good" is what forgetting protects against, "bad" what it does not
        protect against, or not well enough, "alike" what brings the class up no more than in a
        network that never saw it, "unknown" what cannot be said, and why.
    """
    found: dict[str, list[str]] = {"good": [], "bad": [], "alike": [], "unknown": []}
    if evaluation is not None:
        _judge_run_time(found, evaluation, baselines or {})
    if trust is None:
        found["unknown"].append(
            "How far a baked model withstands attacks was not measured; it carries neither filters "
            "nor the original weights, but can be taught the class again."
        )
        return found
    means = trust.means()
    score = _score(means)
    chance = means.get("removal", {}).get("ap_f", {}).get("logit_masked") or 0.0
    attacks = [
        _attack("removal", f"{score}_f_{name}", f"With {attack.text}", attack.moves_logits, chance)
        for name, attack in ATTACKS.items()
    ]
    relearned = [_relearning(measure, chance) for measure in means.get("relearning", ())]
    _judge_beside_trivial(found, means)
    rows = [m for m in means.get("prototypes", ()) if m.startswith(f"{score}_f_head_")]
    relearned += [
        _attack("prototypes", m, f"With its row of the head made from {_images(m)}", True, chance)
        for m in rows
    ]
    _judge_a_cut(found, means, [*attacks, RANKED, *relearned])
    for rule in (NEIGHBOURS, *attacks, RANKED, *relearned, PROBED, MEMBERS):
        rows = means.get(rule.check, {})
        if rule.measure in rows:
            withstood = rule.withstood(rows[rule.measure])
            box = "bad" if not withstood else "alike" if rule.taught else "good"
            found[box].append(rule.written(rows))
    return found


def what_comes_back(means: Mapping[str, Mapping[str, Row]]) -> dict[str, Row]:
    """Returns accuracies on the class by attack in words, "as it is" first, and model.

    Args:
        means: as of :meth:`wfnet.trust.TrustResult.means`.
    """
    found = {}
    for check in ("removal", "relearning", "prototypes"):
        for measure, row in means.get(check, {}).items():
            if re.match("(acc|ap)_f", measure) and not measure.endswith("_recovered"):
                text = CHECKS[check].meaning(measure)
                found[re.sub("^.* (on|of) the (forgotten )?class,? ", "", text)] = row
    return found


def _score(means: Mapping[str, Mapping[str, Row]]) -> str:
    """Returns how measures of the class begin: ``acc``, or ``ap`` for average precisions."""
    measures = {measure for rows in means.values() for measure in rows}
    return "ap" if any(measure.startswith("ap_f") for measure in measures) else "acc"


def _judge_beside_trivial(
    found: dict[str, list[str]], means: Mapping[str, Mapping[str, Row]]
) -> None:
    """Counts attacks that bring back less, or more, than in the better trivial baseline."""
    rows = [row for text, row in what_comes_back(means).items() if text != AS_IT_IS]
    levels = [[row[name] for name in TRIVIAL if row[name] is not None] for row in rows]
    excess = [row["forgetful"] - min(own) for row, own in zip(rows, levels, strict=True) if own]
    if not excess:
        return
    less, more = sum(e < -MARGIN for e in excess), sum(e > MARGIN for e in excess)
    best = Rule("removal", f"{_score(means)}_f_recovered", _BEST, taught=True)
    rows = means.get("removal", {})
    strongest = best.written(rows) if best.measure in rows else ""
    found["good" if less > more else "bad"].append(
        f"Of {len(excess)} attacks, {less} bring back less of the class than in the original with "
        f"nothing but its logit masked or its bias shifted, {more} more.{strongest}"
    )


def _judge_a_cut(
    found: dict[str, list[str]], means: Mapping[str, Mapping[str, Row]], rules: Sequence[Rule]
) -> None:
    """Counts attacks that an export withstands no longer, or only, with the class cut from its
    head."""
    known = [(r, means[r.check][r.measure]) for r in rules if r.measure in means.get(r.check, {})]
    known = [(rule, row) for rule, row in known if row["also_masked"] is not None]
    failed = sum(not rule.withstood(row) for rule, row in known)
    cut = sum(not r.withstood({**row, "forgetful": row["also_masked"]}) for r, row in known)
    if known:
        found["good" if cut < failed else "bad" if cut > failed else "alike"].append(
            f"Cut from the head as well (`wfnet bake --cut-output`), the class comes back by {cut} "
            f"of {len(known)} attacks; by {failed} without that. That it was removed shows then: "
            "its logit is a constant."
        )


def _judge_run_time(
    found: dict[str, list[str]], evaluation: Evaluation, baselines: Mapping[str, Evaluation]
) -> None:
    """Judges what a user meets who sends images while the owner sets the forget label."""
    records, score = evaluation.records, evaluation.score
    forget, retain = evaluation.forget, evaluation.retain
    of_labels = isinstance(evaluation, MultiLabelResult)
    margin = MARGIN_TAUGHT if of_labels else MARGIN

    def mean(name: str, records: Sequence[Any] = records) -> float:
        return means(records, [name])[name]

    known = {record.index for record in records}
    shared = {
        name: [record for record in result.records if record.index in known]
        for name, result in baselines.items()
        if name in _BESIDE
    }

    def beside(measure: str) -> str:
        shown = {name: f"{mean(measure, each):.1%}" for name, each in shared.items() if each}
        for name, count in ((name, len(shared[name])) for name in shown):
            if count < len(records):
                shown[name] += f" on {count} of {len(records)} classes"
        return _beside(shown)

    level = mean("share") if of_labels else 0.0
    if shared.get("retrained"):
        level = mean(forget, shared["retrained"])
    highest = level + margin + _ROUNDING
    before, after = mean(f"original_{forget}"), mean(forget)
    if before <= highest:
        found["unknown"].append(
            f"The original has {before:.1%} {score} on the forgotten class{beside(forget)}: there "
            "is nothing that could be forgotten."
        )
    else:
        forgotten = after <= highest
        found["good" if forgotten else "bad"].append(
            "Who can only send images, while you set the forget label, "
            f"{'gets' if forgotten else 'still gets'} {after:.1%} {score} on the class"
            f"{beside(forget)}; the original has {before:.1%}."
        )
        worst = max(records, key=lambda record: getattr(record, forget))
        if forgotten and getattr(worst, forget) > highest:
            found["bad"].append(
                f"Classes are not forgotten equally well: {worst.name} still has "
                f"{getattr(worst, forget):.1%} {score}."
            )
        found["bad"].append(
            "Whoever chooses the label, or holds the base weights, has the original network with "
            f"{before:.1%} on the class: filters only suppress behaviour, the base still "
            "holds everything it learned."
        )
    before, after = mean(f"original_{retain}"), mean(retain)
    if after >= before - MARGIN - _ROUNDING:
        found["good"].append(
            f"All other classes stay at {after:.1%}{beside(retain)}; the original has {before:.1%}."
        )
    else:
        found["bad"].append(
            f"Forgetting costs all other classes: {after:.1%}{beside(retain)} instead of "
            f"{before:.1%}."
        )

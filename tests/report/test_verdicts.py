"""Sentences stand where their numbers belong, judged beside retrained models."""

import pytest

from wfnet.report.verdicts import judge


def box_of(verdicts, part):
    """The name of the one box with a sentence that contains ``part``, and the sentence."""
    (found,) = [(box, text) for box, texts in verdicts.items() for text in texts if part in text]
    return found


@pytest.mark.parametrize(
    ("before", "after", "box", "text"),
    [
        (0.95, 0.0, "good", "gets 0.0% accuracy on the class; the original has 95.0%"),
        (0.95, 0.019, "good", "gets 1.9%"),
        (0.95, 0.05, "bad", "still gets 5.0%"),
        (0.015, 0.01, "unknown", "nothing that could be forgotten"),
    ],
)
def test_forgetting_at_run_time(make_evaluation, before, after, box, text):
    found = judge(make_evaluation(3, acc_f=after, original_acc_f=before), None)
    assert box_of(found, text)[0] == box
    assert box_of(found, "was not measured")[0] == "unknown"


def test_retrained_models_are_the_level(make_evaluation):
    evaluation = make_evaluation(3, acc_f=0.06, original_acc_f=0.9)
    baselines = {
        "retrained": make_evaluation(3, acc_f=0.05),
        "logit_masked": make_evaluation(2, acc_f=0.0, acc_r=0.72),
    }
    assert box_of(judge(evaluation, None), "still gets 6.0%")[0] == "bad"
    found = judge(evaluation, None, baselines)
    box, sentence = box_of(found, "gets 6.0%")
    assert box == "good"
    assert "(retrained 5.0%, logit masked 0.0% on 2 of 3 classes)" in sentence
    assert "logit masked 72.0% on 2 of 3 classes)" in box_of(found, "All other classes stay")[1]


def test_what_the_network_adds_to_the_trivial_baselines(make_trust):
    values = {("removal", "acc_f"): 0.0, ("removal", "acc_f_offset"): 0.5}
    values |= {("removal", "acc_f_equalised"): 0.5, ("relearning", "acc_f_from_1"): 0.5}
    values |= {("removal", "acc_f_recovered"): 0.5}
    trust = make_trust(values)
    for record in trust.records:
        record.logit_masked.update(dict.fromkeys(record.forgetful, 0.9) | {"acc_f_from_1": 0.1})
        record.bias_shifted.update(acc_f_equalised=0.49)
    box, sentence = box_of(judge(None, trust), "nothing but its logit masked")
    assert box == "bad"
    assert "Of 3 attacks, 1 bring back less" in sentence
    assert "shifted, 1 more. The best one" in sentence
    assert sentence.endswith("brings back 50.0% (logit masked 90.0%).")


def test_the_worst_class_and_the_others_count(make_evaluation):
    found = judge(make_evaluation(40), None)
    assert box_of(found, "Who can only send images")[0] == "good"
    assert box_of(found, "class 3 still has 20.0% accuracy")[0] == "bad"
    assert box_of(found, "All other classes stay at 70.0%")[0] == "good"
    found = judge(make_evaluation(4, acc_r=0.5), None)
    assert box_of(found, "costs all other classes: 50.0% instead of 71.0%")[0] == "bad"


ALONE = {
    ("removal", "acc_f_batchnorm_all"): "With BatchNorm",
    ("removal", "acc_f_equalised"): "With rows scaled to the",
    ("relearning", "acc_f_retain_only"): "Fine-tuned on images of the other classes alone",
}
TAUGHT = {
    ("removal", "acc_f_offset"): "With the class's logit shifted",
    ("relearning", "acc_f_from_1"): "Fine-tuned with 1 image of the class",
}


@pytest.mark.parametrize(
    ("parts", "value", "level", "box"),
    [
        (ALONE, 0.03, 0.0, "bad"),
        (ALONE, 0.03, 0.01, "good"),
        (ALONE, 0.5, None, "bad"),
        (TAUGHT, 0.85, 0.8, "alike"),
        (TAUGHT, 0.95, 0.8, "bad"),
    ],
)
def test_attacks_with_and_without_images_of_the_class(make_trust, parts, value, level, box):
    levels = None if level is None else dict.fromkeys(parts, level)
    found = judge(None, make_trust(dict.fromkeys(parts, value), levels))
    for part in parts.values():
        where, sentence = box_of(found, part)
        assert where == box
        assert f"{value:.1%}" in sentence
        assert (level is not None) == ("(retrained" in sentence)


def test_an_attack_that_destroys_the_rest_says_so(make_trust):
    values = {("removal", "acc_f_offset"): 1.0, ("removal", "acc_r"): 0.9}
    found = judge(None, make_trust(values | {("removal", "acc_r_offset"): 0.1}))
    assert "the others at 10.0% instead of 90.0%" in box_of(found, "logit shifted")[1]


def test_traces_and_neighbours(make_trust):
    values = {
        ("probing", "probe_last"): 0.99,
        ("membership", "lira_auc"): 0.52,
        ("collateral", "acc_nearest_confusion"): 0.8,
        ("removal", "auc_logit"): 0.7,
    }
    levels = {("probing", "probe_last"): 0.98}
    original = {("collateral", "acc_nearest_confusion"): 0.9}
    found = judge(None, make_trust(values, levels, original=original))
    assert box_of(found, "linear probe")[0] == "alike"
    assert box_of(found, "ever saw the class")[0] == "good"
    assert box_of(found, "are only read at 80.0%")[0] == "bad"
    assert box_of(found, "area under the ROC of 0.70.")[0] == "bad"
    assert "Cut from the head" not in str(found)


def test_what_a_cut_of_the_head_changes(make_trust):
    values = {("removal", f"acc_f_{name}"): 0.5 for name in ("affine_reset", "standardised")}
    trust = make_trust(values)
    for record in trust.records:
        record.also_masked.update(acc_f_affine_reset=0.5, acc_f_standardised=0.1)
    box, sentence = box_of(judge(None, trust), "Cut from the head")
    assert box == "good"
    assert "by 1 of 2 attacks; by 2 without" in sentence


def test_chance_is_the_level_of_average_precisions(make_trust):
    """Not what the same attack brings back where a logit was masked."""
    values = {("removal", "ap_f"): 0.3, ("removal", "ap_f_base_head"): 0.9}
    trust = make_trust(values | {("removal", "ap_f_equalised"): 0.35})
    for record in trust.records:
        record.logit_masked.update(ap_f=0.3, ap_f_base_head=0.9, ap_f_equalised=0.3)
    assert box_of(judge(None, trust), "only 35.0% average precision")[0] == "good"
    assert box_of(judge(None, trust), "with 90.0% average precision")[0] == "bad"

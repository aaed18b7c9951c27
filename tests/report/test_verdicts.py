"""Sentences stand where their numbers belong, judged beside retrained models."""

import pytest

from wfnet.report.verdicts import judge

EXPORT = "a baked file reads the class at"


def box_of(verdicts, part):
    """The name of the one box with a sentence that contains ``part``, and the sentence."""
    ((box, sentence),) = [
        (box, sentence)
        for box in ("good", "bad", "alike", "unknown")
        for sentence in getattr(verdicts, box)
        if part in sentence
    ]
    return box, sentence


@pytest.mark.parametrize(
    ("before", "after", "box", "text"),
    [
        (0.95, 0.0, "good", "gets 0.0% accuracy on the class; the original has 95.0%"),
        (0.95, 0.019, "good", "gets 1.9%"),
        (0.95, 0.05, "bad", "still gets 5.0%"),
        (0.075, 0.075, "bad", "still gets 7.5%"),
    ],
)
def test_forgetting_at_run_time(make_evaluation, before, after, box, text):
    found = judge(make_evaluation(3, acc_f=after, original_acc_f=before), None)
    assert box_of(found, "Who can only send images")[0] == box
    assert text in box_of(found, "Who can only send images")[1]


def test_a_class_that_was_never_known_cannot_be_forgotten(make_evaluation):
    found = judge(make_evaluation(3, acc_f=0.01, original_acc_f=0.015), None)
    assert box_of(found, "nothing that could be forgotten")[0] == "unknown"
    assert not any("Who can only" in sentence for sentence in found.good + found.bad)


def test_retrained_models_are_the_level(make_evaluation):
    evaluation = make_evaluation(3, acc_f=0.06, original_acc_f=0.9)
    retrained = {r.index: r for r in make_evaluation(3, acc_f=0.05).records}
    assert box_of(judge(evaluation, None), "still gets 6.0%")[0] == "bad"
    box, sentence = box_of(judge(evaluation, None, retrained), "gets 6.0%")
    assert box == "good"
    assert "(a retrained model: 5.0%)" in sentence


def test_the_worst_class_and_the_others_count(make_evaluation):
    found = judge(make_evaluation(40), None)
    assert box_of(found, "Who can only send images")[0] == "good"
    assert box_of(found, "class 3 is still read at 20.0%")[0] == "bad"
    assert box_of(found, "All other classes stay at 70.0%")[0] == "good"
    found = judge(make_evaluation(4, acc_r=0.5), None)
    assert box_of(found, "costs all other classes: 50.0% instead of 71.0%")[0] == "bad"


@pytest.mark.parametrize(
    ("value", "level", "box"),
    [
        (0.0, 0.0, "good"),
        (0.019, 0.0, "good"),
        (0.03, 0.0, "bad"),
        (0.03, 0.01, "good"),
        (0.019, None, "good"),
        (0.5, None, "bad"),
    ],
)
def test_attacks_without_images_of_the_class(make_trust, value, level, box):
    names = {"acc_f_batchnorm_all": "With BatchNorm", "acc_f_equalised": "With rows scaled to the"}
    values = {("removal", name): value for name in names}
    values[("relearning", "acc_f_retain_only")] = value
    levels = None if level is None else dict.fromkeys(values, level)
    found = judge(None, make_trust(values, levels))
    for part in (*names.values(), "Fine-tuned on images of the other classes alone"):
        where, sentence = box_of(found, part)
        assert where == box
        assert f"{value:.1%}" in sentence
        assert (level is not None) == ("a retrained model" in sentence)


@pytest.mark.parametrize(
    ("value", "level", "box"), [(0.85, 0.8, "alike"), (0.95, 0.8, "bad"), (0.5, None, "bad")]
)
def test_attacks_that_bring_up_the_class_in_any_network(make_trust, value, level, box):
    values = dict.fromkeys([("removal", "acc_f_offset"), ("relearning", "acc_f_from_1")], value)
    levels = None if level is None else dict.fromkeys(values, level)
    found = judge(None, make_trust(values, levels))
    assert box_of(found, "With the class's logit shifted")[0] == box
    assert box_of(found, "Fine-tuned with 1 image of the class")[0] == box


def test_an_attack_that_destroys_the_rest_says_so(make_trust):
    values = {("removal", "acc_f_offset"): 1.0, ("removal", "acc_r"): 0.9}
    found = judge(None, make_trust(values | {("removal", "acc_r_offset"): 0.1}))
    assert "the others at 10.0% instead of 90.0%" in box_of(found, "logit shifted")[1]


def test_traces_and_neighbours(make_trust):
    values = {
        ("probing", "probe_last"): 0.99,
        ("membership", "lira_auc"): 0.52,
        ("collateral", "acc_nearest_confusion"): 0.8,
    }
    trust = make_trust(
        values,
        {("probing", "probe_last"): 0.98},
        original={("collateral", "acc_nearest_confusion"): 0.9},
    )
    found = judge(None, trust)
    assert box_of(found, "linear probe")[0] == "alike"
    assert box_of(found, "ever saw the class")[0] == "good"
    assert box_of(found, "are only read at 80.0%")[0] == "bad"


def test_what_a_cut_changes_is_said(make_trust):
    values = {("removal", "acc_f_batchnorm_all"): 0.0}
    cut = judge(None, make_trust(values, settings={"cut_output": True}))
    assert box_of(cut, "give a constant for the logit")[0] == "bad"
    assert not any("constant" in sentence for sentence in judge(None, make_trust(values)).bad)


def test_without_checks_nothing_is_claimed(make_evaluation):
    assert box_of(judge(make_evaluation(3), None), "was not measured")[0] == "unknown"
    assert judge(None, None).good == []

from wfnet.trust import removal


def test_a_class_that_is_voted_down_at_the_output_comes_back(make_subject, oracle):
    subject = make_subject(forgetful=oracle, original=oracle)
    subject.layers = ()
    found, _ = removal.measure(oracle, subject)
    assert found["acc_f"] == 0.0
    assert found["acc_f_offset"] == found["acc_f_standardised"] == found["auc_logit"] == 1.0
    assert found["acc_f_recovered"] == 1.0
    assert "acc_f_batchnorm_all" not in found


def test_removal_reports_every_attack_that_applies(make_subject, make_network, closed):
    subject = make_subject(forgetful=closed(0.05))
    values, details = removal.measure(subject.forgetful, subject)
    assert set(values) == set(removal.CHECK.measures)
    assert details["attackers_images"] == {"unlabelled": 32, "of_the_class": 8}
    assert set(removal.measure(make_network(7), subject)[0]) == set(values)
    original, _ = removal.measure(subject.original, subject)
    assert not {"acc_f_base_norms", "acc_f_base_head"} & set(original)  # it is the base


def test_every_class_of_an_export_is_attacked(data, make_network, closed, quick):
    base = make_network(0)
    args = closed(0.05), base, data, ("conv1", "conv2"), [1, 2], quick
    checks = removal.check_export(*args)
    named = [(check["label"], check["name"]) for check in checks]
    assert named == [(1, "quarter 1"), (2, "quarter 2")]
    for check in checks:
        assert set(check["values"]) == set(removal.CHECK.measures)
        assert check["images"]["forget"] == 5
        assert check["images"]["retain"] <= 10  # the other forgotten class is no test
    value = checks[0]["values"]["acc_f_affine_reset"]
    text = removal.describe_export(checks[0])
    assert f"{value:.1%}  BatchNorm's scale and shift reset" in text
    assert "norms of the public base (holds the base as well)" in text

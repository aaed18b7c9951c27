from wfnet.trust import removal


def test_a_class_that_is_voted_down_at_the_output_comes_back(make_subject, oracle):
    subject = make_subject(forgetful=oracle, original=oracle, layers=("conv1",))
    found = removal.measure(oracle, subject, [])["values"]
    assert found["acc_f"] == 0.0
    assert found["acc_f_offset"] == found["acc_f_standardised"] == found["auc_logit"] == 1.0
    assert found["acc_f_recovered"] == 1.0
    assert "acc_f_batchnorm_all" not in found


def test_removal_reports_every_attack_that_applies(make_subject, make_network, closed):
    subject = make_subject(forgetful=closed(make_network(0), 0.05))
    found = removal.measure(subject.forgetful, subject, [])
    assert set(found["values"]) == set(removal.CHECK.measures)
    assert found["details"]["rows"]["multiples"] == 1.0
    assert found["details"]["attackers_images"] == {"unlabelled": 32, "of_the_class": 8}
    original = removal.measure(subject.original, subject, [])["values"]
    assert set(removal.measure(make_network(7), subject, [])["values"]) == set(found["values"])
    assert not {"acc_f_base_norms", "acc_f_base_head"} & set(original)  # it is the base
    plain = make_subject(
        forgetful=make_network(0, norm=False), original=make_network(2, norm=False)
    )
    without = removal.measure(plain.forgetful, plain, [])["values"]
    assert not [name for name in without if "batchnorm" in name]
    assert without["acc_f_recovered"] >= without["acc_f"]

import pytest

from wfnet.trust import similarity


def test_similarity_is_the_mean_over_other_retrained_models(make_subject, make_network):
    model, other = make_network(2), make_network(3)
    assert similarity.measure(model, make_subject())[0] == {}
    found, details = similarity.measure(make_network(1), make_subject(retrained=[model, other]))
    assert set(found) == set(similarity.CHECK.measures)
    assert set(details["forget"]) == {"conv1", "conv2", "input of the head"}
    one, _ = similarity.measure(make_network(1), make_subject(retrained=[model]))
    two, _ = similarity.measure(make_network(1), make_subject(retrained=[other]))
    mean = (one["cka_retain_last"] + two["cka_retain_last"]) / 2
    assert found["cka_retain_last"] == pytest.approx(mean)
    same, _ = similarity.measure(make_network(2), make_subject(retrained=[model]))
    assert same == pytest.approx(dict.fromkeys(same, 1.0))

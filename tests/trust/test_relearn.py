import dataclasses

from wfnet.trust import relearn


def test_more_images_than_there_are_are_left_out_and_said(make_subject, quick):
    subject = make_subject()
    subject.settings = dataclasses.replace(quick, relearn_images=(9, 2), relearn_steps=1)
    found = relearn.measure(subject.forgetful, subject, [])
    assert list(found["values"]) == ["acc_f_retain_only", "acc_f_from_2"]
    assert found["details"]["left_out"] == "relearning from 9 images, of which 8 are at hand"


def test_relearning_uses_the_images_that_it_says(make_subject, monkeypatch):
    seen = []
    work = relearn.relearn

    def spy(model, train, images, label, original, config):
        seen.append((train.labels.tolist(), len(images), label, config.max_epochs))
        return work(model, train, images, label, original, config)

    monkeypatch.setattr(relearn, "relearn", spy)
    subject = make_subject()
    found = relearn.measure(subject.forgetful, subject, [])
    retain, one, three = seen
    assert 1 not in retain[0]
    assert one[0].count(1) == 1
    assert three[0].count(1) == 3
    assert all(images == 5 and label == 1 and epochs == 2 for _, images, label, epochs in seen)
    assert list(found["values"]) == ["acc_f_retain_only", "acc_f_from_1", "acc_f_from_3"]
    for name, course in found["details"]["course"].items():
        assert found["values"][f"acc_f_{name}"] == max(course)
    # one image of the class to three others, as in the data
    assert found["details"]["images"]["from_3"] == {"of_the_class": 3, "others": 9}
    assert (len(one[0]), len(three[0])) == (4, 12)
    assert "10 of its images" in relearn.CHECK.meaning("acc_f_from_10")

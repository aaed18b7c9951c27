import dataclasses

from wfnet.trust import relearn


def test_relearning_uses_the_images_that_it_says(make_subject, quick, monkeypatch):
    seen = []
    work = relearn.relearn

    def spy(model, train, images, label, original, config):
        seen.append((train.labels.tolist(), len(images), label, config.max_epochs))
        return work(model, train, images, label, original, config)

    monkeypatch.setattr(relearn, "relearn", spy)
    subject = make_subject(settings=dataclasses.replace(quick, relearn_images=(1, 9, 3)))
    values, details = relearn.measure(subject.forgetful, subject)
    retain, one, three = seen
    assert 1 not in retain[0]
    assert one[0].count(1) == 1
    assert three[0].count(1) == 3
    assert all(images == 5 and label == 1 and epochs == 2 for _, images, label, epochs in seen)
    assert list(values) == ["acc_f_retain_only", "acc_f_from_1", "acc_f_from_3"]
    assert values == {f"acc_f_{name}": max(c) for name, c in details["course"].items()}
    # one image of the class to three others, as in the data
    assert details["images"]["from_3"] == {"of_the_class": 3, "others": 9}
    assert (len(one[0]), len(three[0])) == (4, 12)
    assert details["left_out"] == "relearning from 9 images, of which 8 are at hand"
    assert "10 of its images" in relearn.CHECK.meaning("acc_f_from_10")

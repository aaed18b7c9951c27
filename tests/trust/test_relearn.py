import dataclasses

from wfnet.trust import relearn


def test_relearning_uses_the_images_that_it_says(make_subject, quick, monkeypatch):
    seen, work = [], relearn.relearn

    def spy(model, train, score, label, original, config):
        seen.append((train.labels.tolist(), label, config.max_epochs))
        return work(model, train, score, label, original, config)

    monkeypatch.setattr(relearn, "relearn", spy)
    subject = make_subject(settings=dataclasses.replace(quick, relearn_images=(1, 9, 3)))
    values, details = relearn.measure(subject.forgetful, subject)
    # one image of the class to three others, as in the data
    counts = [(labels.count(1), len(labels)) for labels, *_ in seen]
    assert counts == [(0, 24), (1, 4), (3, 12)]
    assert [rest for _, *rest in seen] == [[1, 2]] * 3
    assert values == {f"acc_f_{name}": max(c) for name, c in details["course"].items()}
    assert details["images"]["from_3"] == {"of_the_class": 3, "others": 9}
    assert details["left_out"] == "relearning from 9 images, of which 8 are at hand"
    assert "10 of its images" in relearn.CHECK.meaning("acc_f_from_10")

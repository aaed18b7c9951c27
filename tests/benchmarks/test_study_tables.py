"""Tables of a study that is not complete: what there is, and what is missing."""

from evidence import STUDIES
from study_tables import study_text


def value(table, method, measure, mean, spread=None):
    names = {"table": table, "method": method, "measure": measure}
    return {**names, "mean": mean, "spread": spread, "runs": 1}


def test_a_part_of_a_study():
    balanced = [
        value("quality", "original", "acc_r", 99.0),
        value("quality", "wfnet", "acc_r", 98.5, 0.25),
        value("quality", "wfnet", "worst", 2.0),
        value("quality", "scrub", "acc_f", 18.6),
        value("trust", "retrained", "relearning: acc_f_from_1", 0.75),
    ]
    durable = [value("trust", "wfnet", "relearning: acc_f_from_1", 0.5)]
    durable += [value("trust", "also_masked", "relearning: acc_f_from_1", 0.35)]
    groups = [
        {"title": "digits, small/resnet, balanced", "runs": 2, "values": balanced},
        {"title": "digits, small/resnet, durable", "runs": 1, "values": durable},
    ]
    about = {"torch": "2.14.1", "date": "2026-11-30"}
    commands = [{"command": "wfnet train", "commit": name} for name in ("b", "a", "b")]
    content = {"title": "digits", "provenance": about, "commands": commands, "groups": groups}
    text = study_text(STUDIES["digits"], content)
    assert text.startswith("### digits\n\nCommit a, b, torch 2.14.1, 2026-11-30. Seeds, of 3: ")
    assert "ResNet-8 1 or 2, small VGG none, small ViT none" in text
    lines = text.splitlines()
    assert "|  | Acc_r | Acc_f | worst class |" in lines
    assert "| **ResNet-8**, original | 99.00 | - | - |" in lines
    assert "| `balanced` | 98.50 ± 0.25 | - | 2.00 |" in lines
    assert "| SCRUB | - / 18.6 / - / - |" in lines
    attack = "| fine-tuned with one image of the class | 50.0 | 35.0 | 75.0 |"
    assert [line for line in lines if "fine-tuned" in line] == [attack]

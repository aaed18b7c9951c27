import torch

from wfnet.shadows.comparisons import ALL, ShadowResult, split


def test_of_every_pair_of_rounds_one_model_has_seen_an_image():
    seen = torch.tensor([[True, False], [False, True], [False, False], [True, True]])
    own = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0]])
    pair = split(own, own + 10, seen)
    assert pair.unlearned.tolist() == [[0, 3], [6, 7]]
    assert pair.reference.tolist() == [[12, 11], [14, 15]]


def test_table_has_methods_side_by_side_and_says_what_is_needed():
    row = {"against": "class", "measure": "u_lira", "what": "auc", "index": ALL, "name": ALL}
    known = {"value": 0.5, "low": 0.4, "high": 0.6, "needs": None}
    rows = [
        {**row, "method": "forgetful", **known},
        {**row, "method": "retrained", **known, "value": 0.45},
        {**row, "what": "tpr", "method": "forgetful", **known, "value": None, "needs": "9 scores"},
        {**row, "index": "3", "method": "original", **known},
    ]
    table = ShadowResult(rows, {}, []).table()
    assert "0.500 [0.400, 0.600]" in table
    assert "0.450" in table.splitlines()[2]
    assert "tpr needs 9 scores" in table
    assert "original" not in table

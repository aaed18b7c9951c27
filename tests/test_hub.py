import json
import shutil

import pytest
import torch

import wfnet
from wfnet import hub, models
from wfnet.data import TensorImages
from wfnet.services.files import fingerprint, write_json
from wfnet.trust import CHECKS, TrustRecord, TrustResult

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra hf is not installed")
NAMES = ["ant", "bee", "a|cat"]


@pytest.fixture
def net():
    net = wfnet.WFNet(models.create("resnet", 3, in_channels=3, width=8), 3)
    for alpha in net.filter_parameters():
        torch.nn.init.normal_(alpha, 2.0)
    return net


@pytest.fixture
def run(net, tmp_path):
    """A run with an evaluation, and one trust check of these filters."""
    folder = tmp_path / "run"
    net.save_pretrained(folder)
    data = TensorImages(torch.rand(12, 3, 8, 8), torch.arange(12) % 3, NAMES)
    wfnet.evaluate(net, data, progress=False).to_json(folder / "evaluation.json")
    write_json(
        folder / "config.json",
        {"options": {"data_dir": "/home/me", "mean": [0.5]}, "classes": NAMES},
    )
    values = {"acc_f": 0.125, "acc_f_offset": 0.75}, {"acc_f": 1.0}, {}, {}
    record = TrustRecord(0, "ant", "removal", *values, 0, None, {}, 1.0, "")
    TrustResult([record], {}).to_json(folder / "trust.json")
    return folder


def test_the_card_has_what_a_stranger_needs(net, run, tmp_path):
    target = tmp_path / "card"
    about = {"license": "mit", "base": "resnet18.a1_in1k", "model": net.model}
    hub.save_for_hub(run, target, "me/forgets", **about)
    files = ["README.md", "wf_config.json", "wf_model.safetensors"]
    assert sorted(path.name for path in target.iterdir()) == files
    card = huggingface_hub.ModelCard.load(target / "README.md")
    assert (card.data.license, card.data.base_model) == ("mit", "timm/resnet18.a1_in1k")
    assert card.data.pipeline_tag == "image-classification"
    text = card.text
    assert fingerprint(net.model) in text
    assert "| mean | [0.5] |" in text
    assert "0. ant\n1. bee\n2. a|cat\n" in text
    assert 'from_pretrained("me/forgets")' in text
    assert "| accuracy on the forgotten class, as it is | 1.000 | 0.125 |" in text
    assert CHECKS["removal"].question in text
    assert "Not withstood:" in text
    means = json.loads((run / "evaluation.json").read_text())["mean"]
    assert f"| under its own row | {means['acc_f']:.2%} | {means['acc_r']:.2%} |" in text
    assert "/home/me" not in text
    assert str(run) not in text
    # results of other filters are not shown, and filters alone will do
    net.filter_parameters()[0].data.zero_()
    net.save_pretrained(run)
    (run / "trust.json").unlink()
    (run / "config.json").unlink()
    hub.save_for_hub(run, target)
    text = (target / "README.md").read_text()
    assert "under its own row" not in text
    assert "were not run" in text
    assert "names are not recorded" in text
    assert 'from_pretrained("user/repo", base_model)' in text


def test_a_repository_is_pushed_and_loaded_with_and_without_its_base(
    net, run, tmp_path, monkeypatch
):
    sent = tmp_path / "sent"

    class Api:
        def __init__(self, **about):
            assert (about["token"], about["library_name"]) == ("secret", "wfnet")

        def create_repo(self, repo_id, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            shutil.copytree(folder_path, sent / repo_id)

    def download(repo_id, allow_patterns):
        assert allow_patterns == ["wf_config.json", "wf_model.safetensors"]
        if repo_id != "me/forgets":
            raise OSError("no such repository")
        return str(sent / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    base = net.bake(None)
    url = hub.push_to_hub(run, "me/forgets", private=True, token="secret", base="hf:me/base")
    assert url == "https://huggingface.co/me/forgets"
    monkeypatch.setattr("wfnet.pretrained.load_base", {"hf:me/base": base}.__getitem__)
    images = torch.rand(2, 3, 8, 8)
    for given in ((), (base,)):
        loaded = wfnet.WFNet.from_pretrained("me/forgets", *given)
        assert torch.equal(loaded(images, forget=1), net(images, forget=1))
    with pytest.raises(FileNotFoundError, match=r"'me/gone' is no folder.*no such repository"):
        wfnet.WFNet.from_pretrained("me/gone")
    with pytest.raises(ValueError, match="give it as base_model"):
        wfnet.WFNet.from_pretrained(run)
    with pytest.raises(FileNotFoundError, match="holds no wfnet checkpoint"):
        hub.push_to_hub(tmp_path, "me/forgets")

"""The page: self-contained, complete, escaped, equal to the JSON; in Chromium, too."""

import html
import json
import re
import shutil
import subprocess

import pytest

from wfnet.report import page
from wfnet.trust import CHECKS


@pytest.fixture
def shown(run, parse):
    return parse(page.write_report(run))


@pytest.mark.parametrize("classes", [3, 100])
def test_every_class_with_the_numbers_of_the_json(tmp_path, make_run, parse, classes):
    found = parse(page.write_report(make_run(tmp_path, classes)))
    head, *rows = found.tables["class-table"]
    titles = [cell[1] for cell in head[1]]
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(rows) == classes
    columns = {"#": "index", "images": "n_forget", "ZRF": "zrf"}
    percent = {"Acc_f": "acc_f", "Acc_r": "acc_r"}
    percent |= {f"{title} before": f"original_{name}" for title, name in percent.items()}
    for (attrs, cells), record in zip(rows, content["classes"], strict=True):
        assert attrs["id"] == f"class-{record['index']}"
        assert record["name"] in attrs["data-search"]
        assert cells[titles.index("class")] == [record["name"], record["name"]]
        for title, name in (columns | percent).items():
            value, written = cells[titles.index(title)]
            assert float(value) == record[name]  # bit for bit
            scale = 100 if title in percent else 1
            assert float(written) == pytest.approx(scale * record[name], abs=0.0051)
    assert ("Acc_f@5" in titles) == (classes > 5)
    by_class = found.tables["trust-table"][1:]
    assert len(by_class) == (classes + 1) // 2
    assert by_class[1][1][2] == ["0.9", "0.900 (+0.800)"]


def test_nothing_is_loaded_and_ids_are_unique(shown):
    assert len(set(shown.ids)) == len(shown.ids)
    for tag, attrs in shown.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attrs.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
        assert not [name for name in attrs if name.startswith("on")]
        assert tag != "a" or attrs["href"][1:] in shown.ids
    policy = next(a["content"] for t, a in shown.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert [bool(attrs["alt"]) for tag, attrs in shown.tags if tag == "img"] == [True, True]


def test_names_from_data_are_escaped(tmp_path, make_run, parse, evil):
    names = [evil, 'a "quoted" name', "b & c <i>"]
    found = parse(page.write_report(make_run(tmp_path, 3, names)))
    assert [tag for tag, _ in found.tags].count("script") == 1  # ours
    rows = found.tables["class-table"][1:]
    assert [cells[1] for _, cells in rows] == [[name, name] for name in names]
    assert evil in found.text


def test_checks_are_in_words_and_empty_columns_are_left_out(shown):
    measures = {name for check in CHECKS.values() for name in check.measures} - {"acc_f", "acc_r"}
    assert not measures & set(re.findall(r"\w+", shown.text))
    heads = {
        rows[1][1][0][1]: [cell[1] for cell in rows[0][1]]
        for name, rows in shown.tables.items()
        if name.startswith("#")
    }
    relearning, probing = (CHECKS[name] for name in ("relearning", "probing"))
    every = ["measure", "model under test", "retrained", "original", "distance"]
    assert heads[relearning.measures[relearning.headline]] == every
    assert heads[probing.measures[probing.headline]] == [h for h in every if h != "original"]
    assert shown.text.count("Not measured") == 1
    assert "0.025 on average" in shown.text
    assert "phi(x) = log(p_y / (1 - p_y))" in shown.text
    assert "`" not in shown.text.partition("Definitions")[2].partition("Configuration")[0]


def test_baselines_and_the_papers_tables_are_shown(run, parse):
    evaluation = json.loads((run / "evaluation.json").read_text())
    content = {"method": "retrained", "evaluation": evaluation, "relearning": None, "settings": {}}
    (run / "retrained.json").write_text(json.dumps(content))
    found = parse(page.write_report(run))
    assert "retrained Acc_f" in [cell[1] for cell in found.tables["class-table"][0][1]]
    assert any(cells[0][1] == "wfnet" for rows in found.tables.values() for _, cells in rows)
    row = {"method": "ours", "acc_r": 98.125, "acc_f": 0.5, "zrf": None, "published": {"acc_r": 94}}
    group = {"acc_r": 0.97, "original_acc_r": 0.98, "acc_f": 0.01, "original_acc_f": 0.96}
    tables = {
        "title": "digits, small/resnet",
        "published_source": "Poppi et al.",
        "groups": [{"groups": 3, "size": 2, "mean": group}],
        "rows": [row],
    }
    (run / "tables.json").write_text(json.dumps(tables))
    found = parse(page.write_report(run))
    cells = [cells for rows in found.tables.values() for _, cells in rows]
    assert [["ours", "ours"], ["98.125", "98.12"], ["0.5", "0.5"], ["94", "94"]] in cells
    assert "published: Poppi et al." in found.text
    assert "Acc_r 97.00% (original 98.00%)" in found.text


def test_exports_are_described_and_what_was_left_out_is_said(run, parse, caplog):
    found = {"name": "seven", "original_acc_f": 0.9, "original_acc_r": 0.8}
    found |= {"images": {"forget": 3, "retain": 4}, "values": {"acc_f": 0.01, "acc_r": 0.7}}
    found["details"] = {"attackers_images": {"unlabelled": 32, "of_the_class": 8}}
    content = {"file": "x.safetensors", "prune_below": 0.1, "classes": [found]}
    (run / "x.trust.json").write_text(json.dumps(content))
    (run / "y.trust.json").write_text(json.dumps({"filters_digest": "b"}))
    (run / "wf_config.json").write_text('{"filters_digest": "a"}')
    text = parse(page.write_report(run)).text
    assert "y.trust.json is of other filters and left out" in text
    assert "y.trust.json is of other filters and left out" in caplog.text
    assert "x.safetensors, gates below 0.1 at 0class seven: accuracy on it 90.0% -> 1.0%" in text


def test_several_labels_per_image(tmp_path, make_run, parse):
    mean = {"ap_f": 0.2, "map_r": 0.8, "original_ap_f": 0.9, "original_map_r": 0.81}
    records = [
        {"index": k, "name": f"label {k}", "images": 9, "share": 0.1, **mean, "ap_f": k / 100}
        for k in range(4)
    ]
    content = {"kind": "multi-label", "mean": mean, "settings": {}, "classes": records}
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    found = parse(page.write_report(tmp_path))
    head, *rows = found.tables["class-table"]
    assert [cell[1] for cell in head[1]][5] == "AP_f"
    assert [float(cells[5][0]) for _, cells in rows] == [r["ap_f"] for r in records]
    assert "90.0% → 20.0%" in found.text  # a card
    assert "wfnet trust" not in found.text  # which does not take such data
    make_run(tmp_path, 4, trust=False)
    text = parse(page.write_report(tmp_path)).text
    assert f"wfnet trust {tmp_path}" in text
    assert f"wfnet baseline {tmp_path}" in text


SCRIPT = """
const table = document.getElementById('class-table');
const column = (k, n) => [...table.tBodies[0].rows].filter(r => !r.hidden).slice(0, n)
  .map(r => r.cells[k].textContent);
const head = k => table.tHead.rows[0].cells[k].querySelector('button').click();
const found = {title: document.title};
head(4); found.worst = column(4, 1);
head(4); found.best = column(4, 1); found.sorted = table.tHead.rows[0].cells[4].ariaSort;
head(1); found.names = column(1, 3);
const input = document.getElementById('class-table-search');
input.value = 'CLASS 11'; input.dispatchEvent(new Event('input'));
found.search = column(1, 99);
found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const p = document.createElement('p'); p.id = 'result'; p.textContent = JSON.stringify(found);
document.body.append(p);
"""


def test_sorting_and_search_in_a_browser(tmp_path, make_run, evil):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    names = [f"class {k}" for k in range(200)]
    names[2] = evil
    text = page.write_report(make_run(tmp_path, 200, names)).read_text()
    scripted = tmp_path / "scripted.html"
    scripted.write_text(text.replace("</body>", f"<script>{SCRIPT}</script></body>"))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options += ["--window-size=390,900", f"--user-data-dir={tmp_path / 'profile'}"]
    call = [browser, *options, scripted.as_uri()]
    shown = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
    result = re.search(r'<p id="result">(.*?)</p>', shown, re.DOTALL).group(1)
    assert json.loads(html.unescape(result)) == {
        "title": f"wfnet: {tmp_path.name}",  # no name of a class was run
        "worst": ["20.00"],
        "best": ["0.00"],
        "sorted": "ascending",
        "names": [evil, "class 0", "class 1"],
        "search": [name for name in names if "class 11" in name],
        "wide": False,
    }

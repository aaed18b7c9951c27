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
    tags = [tag for tag, _ in shown.tags]
    assert "button" not in tags  # the script makes them, and shows what needs it:
    assert all("hidden" in attrs for _, attrs in shown.tags if attrs.get("class") == "search")
    assert "hidden" in shown.tags[tags.index("fieldset")][1]
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
        name: [cell[1] for cell in shown.tables[f"check-{name}"][0][1]]
        for name in ("relearning", "probing")
    }
    every = ["measure", "original", "this network", "retrained", "distance"]
    assert heads["relearning"] == every
    assert heads["probing"] == [h for h in every if h != "original"]
    assert shown.text.count("Not measured") == 1
    assert "0.025 on average" in shown.text
    assert "phi(x) = log(p_y / (1 - p_y))" in shown.text
    assert "`" not in shown.text.partition("Definitions")[2].partition("Configuration")[0]


def test_methods_stand_side_by_side_over_the_classes_that_all_have(run, parse, make_evaluation):
    evaluation = make_evaluation(4, acc_r=0.8).as_dict()
    times = {"relearning": {"mean": {"epochs": 3.0}}, "settings": {}}
    for name in ("retrained", "scrub"):
        (run / "baselines").mkdir(exist_ok=True)
        content = {"method": name, "evaluation": evaluation, **times}
        (run / "baselines" / f"{name}.json").write_text(json.dumps(content))
    group = {"acc_r": 0.97, "original_acc_r": 0.98, "acc_f": 0.01, "original_acc_f": 0.96}
    row = {"method": "wfnet", "rt": 7.0, "insertion": None, "deletion": None}
    shadow = {"index": "all", "against": "image", "measure": "u_lira", "what": "auc"}
    shadow |= {"method": "forgetful", "value": 0.625}
    (run / "shadows.json").write_text(json.dumps({"rows": [shadow]}))
    tables = {
        "published_source": "Poppi et al.",
        "groups": [{"groups": 3, "size": 2, "mean": group}],
        "rows": [row | {"published": {"acc_r": 94.0}}],
    }
    (run / "tables.json").write_text(json.dumps(tables))
    found = parse(page.write_report(run))
    head, *rows = found.tables["method-table"]
    titles = [cell[1] for cell in head[1]]
    shown = {cells[0][1]: dict(zip(titles, cells, strict=True)) for _, cells in rows}
    assert list(shown) == ["original", "this network", "retrained", "SCRUB"]
    records = json.loads((run / "evaluation.json").read_text())["classes"][:4]
    mean = sum(record["acc_f"] for record in records) / 4  # of 12 classes
    assert float(shown["this network"]["Acc_f, %"][0]) == pytest.approx(100 * mean)
    assert shown["this network"]["RT, epochs"] == [None, ""]  # it is over 12 classes
    assert shown["SCRUB"]["RT, epochs"] == ["3.0", "3.0"]
    assert shown["SCRUB"]["Acc_r, %"][1] == "80.00"
    assert shown["this network"]["published Acc_r"] == ["94.0", "94.00"]
    assert shown["this network"]["U-LiRA, image"] == ["0.625", "0.625"]
    assert "those that all have (4)" in found.text
    assert "Acc_r 97.00% (original 98.00%)" in found.text
    classes = [cell[1] for cell in found.tables["class-table"][0][1]]
    assert classes[-4:] == [
        f"{m}: {acc}" for m in ("retrained", "SCRUB") for acc in ("Acc_f", "Acc_r")
    ]


def test_what_comes_back(tmp_path, make_run, make_trust, parse):
    values = {("removal", "acc_f"): 0.0, ("removal", "acc_f_offset"): 0.75}
    values |= {("removal", "acc_r"): 1.0, ("relearning", "acc_f_from_1"): 0.5}
    trust = make_trust(values, {("removal", "acc_f"): 0.25})
    trust.records[0].logit_masked.update(acc_f=0.125)
    trust.to_json(make_run(tmp_path, 3) / "trust.json")
    head, *rows = parse(page.write_report(tmp_path)).tables["attack-table"]
    assert [c[1] for c in head[1]] == ["attack", "this network", "retrained", "logit masked"]
    assert [[cell[1] for cell in cells] for _, cells in rows] == [
        ["as it is", "0.0", "25.0", "12.5"],
        ["the class's logit shifted until it is predicted as often as it occurs", "75.0", "", ""],
        ["while fine-tuning with 1 of its images", "50.0", "", ""],
    ]


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
    content = {"kind": "multi-label", "format": 1, "seconds": 1.0, "settings": {}}
    content["classes"] = records
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    found = parse(page.write_report(tmp_path))
    head, *rows = found.tables["class-table"]
    assert [cell[1] for cell in head[1]][5] == "AP_f"
    assert [float(cells[5][0]) for _, cells in rows] == [r["ap_f"] for r in records]
    assert "90.0% → 1.5%" in found.text  # a card
    assert f"wfnet trust {tmp_path}" in found.text
    assert f"wfnet baseline {tmp_path}" in found.text


SCRIPT = """
const table = document.getElementById('class-table');
const column = (k, n) => [...table.tBodies[0].rows].filter(r => !r.hidden).slice(0, n)
  .map(r => r.cells[k].textContent);
const head = k => table.tHead.rows[0].cells[k].querySelector('button').click();
const found = {title: document.title, width: innerWidth};
found.wide = document.documentElement.scrollWidth > innerWidth;
for (const part of document.querySelectorAll('details')) part.open = true;
found.wide_open = document.documentElement.scrollWidth > innerWidth;
head(4); found.worst = column(4, 1);
head(4); found.best = column(4, 1); found.sorted = table.tHead.rows[0].cells[4].ariaSort;
head(1); found.names = column(1, 3);
const input = document.getElementById('class-table-search');
input.value = 'CLASS 11'; input.dispatchEvent(new Event('input'));
found.search = column(1, 99);
const rows = '#attack-table th[data-method], #method-table tr[data-method]';
const shown = () => [...document.querySelectorAll(rows)]
  .filter(part => part.getClientRects().length).map(part => part.dataset.method);
document.querySelector('#methods [value=retrained]').click(); found.without = shown();
document.querySelector('#methods [value=retrained]').click(); found.again = shown();
parent.postMessage(found, '*');
"""
# Chromium's window is never narrower than 500 pixels: a frame is.
FRAMES = """<script>
addEventListener('message', ({data}) => {
  document.body.append(Object.assign(document.createElement('p'),
    {id: `result-${data.width}`, textContent: JSON.stringify(data)}));
});
</script><body><iframe src="scripted.html" style="width: 390px; border: 0"></iframe>
<iframe src="scripted.html" style="width: 1280px; border: 0"></iframe>
"""


def test_widths_sorting_search_and_choice_in_a_browser(tmp_path, make_run, evil):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    names = [f"class {k}" for k in range(200)]
    names[2] = evil
    text = page.write_report(make_run(tmp_path, 200, names)).read_text()
    scripted = text.replace("</body>", f"<script>{SCRIPT}</script></body>")
    (tmp_path / "scripted.html").write_text(scripted)
    frames = tmp_path / "frames.html"
    frames.write_text(FRAMES)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options += ["--virtual-time-budget=20000", "--window-size=1400,900"]
    options += [f"--user-data-dir={tmp_path / 'profile'}"]
    call = [browser, *options, frames.as_uri()]
    shown = subprocess.run(call, capture_output=True, text=True, timeout=120, check=True).stdout
    everyone = ["original", "wfnet", "retrained"]
    for width in (390, 1280):
        result = re.search(rf'<p id="result-{width}">(.*?)</p>', shown, re.DOTALL).group(1)
        assert json.loads(html.unescape(result)) == {
            "title": f"wfnet: {tmp_path.name}",  # no name of a class was run
            "width": width,
            "wide": False,
            "wide_open": False,
            "worst": ["20.00"],
            "best": ["0.00"],
            "sorted": "ascending",
            "names": [evil, "class 0", "class 1"],
            "search": [name for name in names if "class 11" in name],
            "without": [m for m in 2 * everyone if m != "retrained"],
            "again": 2 * everyone,
        }

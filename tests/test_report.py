"""The report: self-contained, complete, escaped, equal to the JSON; in Chromium, too."""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.report.contents import PICTURES, read_contents, statements, write_report
from wfnet.trust import CHECKS, TrustRecord, TrustResult

EVIL = '</td><script>document.title="owned"</script><img src=x onerror="document.title=1">'
# One white pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8/5+hHgAHggJ/PchI7wAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "input", "br", "link"}


def make_run(folder, classes, names=None, trust=True):
    names = names or [f"class {k}" for k in range(classes)]
    records = [
        ClassRecord(
            index=k, name=names[k], n_forget=5 + k % 3, n_retain=5 * classes,
            acc_r=0.70 + 0.1 * math.sin(k), acc_f=0.2 if k % 7 == 3 else k / 1e5, acc_r_top5=0.9,
            acc_f_top5=0.1, zrf=0.5 + k / 1e4, original_acc_r=0.72, original_acc_f=0.6 + 0.3 *
            math.cos(k), original_acc_r_top5=0.9, original_acc_f_top5=0.95, original_zrf=0.34,
        )
        for k in range(classes)
    ]  # fmt: skip
    EvaluationResult.from_records(
        records, math.e, {"num_classes": classes, "images": 5 * classes}, 1.0
    ).to_json(folder / "evaluation.json")
    if trust:
        found = [
            TrustRecord(
                k, names[k], check, {module.HEADLINE: 0.9 - k / 1e5, "auc_logit": 0.99},
                {module.HEADLINE: 1.0}, {module.HEADLINE: 0.1}, {}, 1,
                f"{module.TITLE}: needs more {EVIL}",
                {"standard_error": 0.025} if check == "membership" else {}, 1.0, f"{check}{k}",
            )
            for k in range(0, classes, 2)
            for check, module in CHECKS.items()
        ]  # fmt: skip
        TrustResult(found, {"samples": 10}).to_json(folder / "trust.json")
    config = {"command": "untrain", "options": {"model": f"net {EVIL}", "data": "some"},
              "versions": {"torch": "2.99"}}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "gates.png").write_bytes(PNG)
    (folder / "trust.png").write_bytes(PNG)
    return folder


class Page(HTMLParser):
    """Tags in order, ids, tables as rows of (data-value, text), and whether tags nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.open, self.tables, self.text = [], [], [], {}, []
        self.current, self.row, self.cell = None, None, None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.current = self.tables.setdefault(attrs.get("id", f"#{len(self.tables)}"), [])
        if tag == "tr":
            self.row = (attrs, [])
            self.current.append(self.row)
        if tag in ("td", "th"):
            self.cell = [attrs.get("data-value"), ""]
            self.row[1].append(self.cell)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)
        if self.cell is not None:
            self.cell[1] += data


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, 12)


@pytest.mark.parametrize("classes", [3, 1000])
def test_every_class_with_the_numbers_of_the_json(tmp_path, classes):
    path = write_report(make_run(tmp_path, classes))
    page = Page(path.read_text())
    head, *rows = page.tables["class-table"]
    titles = [cell[1] for cell in head[1]]
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert len(rows) == classes
    columns = {"#": "index", "class": "name", "images": "n_forget", "Acc_f": "acc_f",
               "Acc_r": "acc_r", "Acc_f before": "original_acc_f",
               "Acc_r before": "original_acc_r", "ZRF": "zrf"}  # fmt: skip
    for (attrs, cells), record in zip(rows, content["classes"], strict=True):
        assert attrs["id"] == f"class-{record['index']}"
        assert record["name"] in attrs["data-search"]
        for title, name in columns.items():
            value, shown = cells[titles.index(title)]
            if name == "name":
                assert value == shown == record[name]
            else:
                assert float(value) == record[name]  # bit for bit
                scale = 100 if name.endswith(("acc_f", "acc_r")) else 1
                assert float(shown) == pytest.approx(scale * record[name], abs=0.0051)
    assert ("Acc_f@5" in titles) == (classes > 5)
    trust = json.loads((tmp_path / "trust.json").read_text())
    by_class = page.tables["trust-table"][1:]
    assert len(by_class) == len({r["index"] for r in trust["records"]})
    assert float(by_class[1][1][2][0]) == 0.9 - 2 / 1e5
    assert path.stat().st_size < 3e6


def test_nothing_is_loaded_and_ids_are_unique(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert len(set(page.ids)) == len(page.ids)
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name in ("src", "href", "srcset", "action", "poster", "data"):
            value = attrs.get(name, "#")
            assert value.startswith(("#", "data:image/png;base64,")), (tag, value)
        assert not [name for name in attrs if name.startswith("on")]
        if tag == "a":
            assert attrs["href"][1:] in page.ids
        if tag == "img":
            assert attrs["alt"]
    assert "@import" not in text
    assert "url(" not in text
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    shown = [a for t, a in page.tags if t == "img"]
    assert len(shown) == 2
    assert base64.b64decode(shown[0]["src"].partition(",")[2]) == PNG


def test_names_from_data_are_escaped(tmp_path):
    names = [EVIL, 'a "quoted" name', "b & c <i>"]
    page = Page(write_report(make_run(tmp_path, 3, names)).read_text())
    assert [tag for tag, _ in page.tags].count("script") == 1  # ours
    assert not any(attrs.get("src") == "x" for _, attrs in page.tags)
    rows = page.tables["class-table"][1:]
    assert [cells[1] for _, cells in rows] == [[name, name] for name in names]
    assert EVIL in "".join(page.text)


def test_definitions_are_plain_text(run):
    text = "".join(Page(write_report(run).read_text()).text)
    assert "phi(x) = log(p_y / (1 - p_y))" in text
    assert "wfnet.evaluation.relearning.relearn" in text
    assert "`" not in text.partition("Definitions")[2].partition("Configuration")[0]
    for module in CHECKS.values():
        assert module.TITLE in text


def test_sections_say_what_is_missing(tmp_path):
    make_run(tmp_path, 4, trust=False)
    (tmp_path / "gates.png").unlink()
    text = "".join(Page(write_report(tmp_path).read_text()).text)
    assert f"wfnet trust {tmp_path}" in text
    assert f"wfnet baseline {tmp_path}" in text
    assert "was not measured" in text


def test_baselines_and_the_papers_tables_are_shown(run):
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "baselines").mkdir()
    content = {"method": "retrained", "evaluation": evaluation, "relearning": None, "settings": {}}
    (run / "baselines" / "retrained.json").write_text(json.dumps(content))
    page = Page(write_report(run).read_text())
    titles = [cell[1] for cell in page.tables["class-table"][0][1]]
    assert "retrained Acc_f" in titles
    tables = {
        "title": "digits, small/resnet", "published_source": "Poppi et al.", "groups": [],
        "rows": [{"method": "wfnet", "acc_r": 98.125, "acc_f": 0.5, "zrf": None,
                  "published": {"acc_r": 94.0}}],
    }  # fmt: skip
    (run / "tables.json").write_text(json.dumps(tables))
    page = Page(write_report(run).read_text())
    shown = [cells for rows in page.tables.values() for _, cells in rows]
    assert [["wfnet", "wfnet"], ["98.125", "98.12"], ["0.5", "0.5"], ["94.0", "94"]] in shown
    assert "Poppi et al." in "".join(page.text)


def test_several_labels_per_image(tmp_path):
    records = [
        {"index": k, "name": f"label {k}", "images": 9, "share": 0.1, "ap_f": 0.2 + k / 100,
         "map_r": 0.8, "original_ap_f": 0.9, "original_map_r": 0.81}
        for k in range(4)
    ]  # fmt: skip
    mean = {name: 0.5 for name in records[0] if name not in ("index", "name", "images")}
    content = {"format": 1, "kind": "multi-label", "mean": mean, "settings": {}, "seconds": 1.0,
               "classes": records}  # fmt: skip
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    page = Page(write_report(tmp_path).read_text())
    head, *rows = page.tables["class-table"]
    assert [cell[1] for cell in head[1]][5] == "AP_f"
    assert [float(cells[5][0]) for _, cells in rows] == [r["ap_f"] for r in records]
    text = "".join(page.text)
    assert "mAP_r" in text
    assert "wfnet trust" not in text  # which does not take such data


def test_statements_have_the_measured_numbers(run):
    contents = read_contents(run)
    good, bad = statements(contents.evaluation, contents.trust)
    assert f"{100 * contents.evaluation.mean.acc_f:.1f}%" in good[0]
    row = contents.trust.means()["removal"]["acc_f_batchnorm_all"]
    sentence = next(s for s in bad if "BatchNorm" in s)
    assert f"{100 * row['forgetful']:.1f}%" in sentence
    assert f"a retrained model: {100 * row['retrained']:.1f}%" in sentence
    good, bad = statements(contents.evaluation, None)
    assert any("was not measured" in sentence for sentence in bad)
    assert statements(None, None)[0] == []
    shown = "".join(Page(write_report(run).read_text()).text)
    assert "0.025 on average" in shown


def test_trust_of_other_filters_is_left_out(run, caplog):
    content = json.loads((run / "trust.json").read_text())
    content["settings"]["filters"] = "0" * 64
    (run / "trust.json").write_text(json.dumps(content))
    assert read_contents(run).trust is not None  # no filters to compare with
    (run / "wf_model.safetensors").write_bytes(b"other")
    assert read_contents(run).trust is None
    assert "is of other filters" in caplog.text


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        write_report(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds nothing to report yet: `wfnet evaluate"):
        write_report(tmp_path)
    make_run(tmp_path, 2)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_an_old_report_survives_a_failure(run, monkeypatch):
    path = write_report(run)
    before = path.read_bytes()
    monkeypatch.setattr("wfnet.report.contents.render", lambda contents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run)
    assert path.read_bytes() == before


def test_every_picture_of_the_figures_has_a_caption():
    assert all(len(text) > 20 and name.endswith(".png") for name, text in PICTURES.items())


# -- in a browser ---------------------------------------------------------------------------------


def find_browser():
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if shutil.which(name):
            return shutil.which(name)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
        return path if os.path.exists(path) else None


@pytest.fixture(scope="module")
def browser():
    found = find_browser()
    if found is None:
        pytest.skip("no chromium, google-chrome or playwright browser is installed")
    return found


def in_browser(browser, page, script, tmp_path):
    """What ``script`` puts into the title of the page, run after its own script."""
    changed = tmp_path / "scripted.html"
    text = page.read_text()
    assert text.count("</body>") == 1
    changed.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    shown = subprocess.run(
        [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", changed.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    return json.loads(html.unescape(re.search(r'<p id="result">(.*?)</p>', shown, re.S).group(1)))


SCRIPT = """
const table = document.getElementById('class-table');
const column = (k, n) => [...table.tBodies[0].rows].filter(r => !r.hidden).slice(0, n)
  .map(r => r.cells[k].textContent);
const head = k => table.tHead.rows[0].cells[k].querySelector('button').click();
const found = {title: document.title};
found.before = column(0, 3);
head(4); found.worst = column(4, 3);
head(4); found.best = column(4, 3); found.sorted = table.tHead.rows[0].cells[4].ariaSort;
head(1); found.names = column(1, 3);
head(0); found.back = column(0, 3);
const input = document.getElementById('class-table-search');
input.value = 'CLASS 11'; input.dispatchEvent(new Event('input'));
found.search = column(1, 99); found.count = document.querySelector('[data-count=class-table]')
  .textContent;
found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
found.loaded = performance.getEntriesByType('resource').length;
const p = document.createElement('p'); p.id = 'result'; p.textContent = JSON.stringify(found);
document.body.append(p);
"""


@pytest.mark.parametrize("classes", [12, 1000])
def test_sorting_and_search_in_a_browser(browser, tmp_path, classes):
    names = [f"class {k}" for k in range(classes)]
    names[2] = EVIL
    page = write_report(make_run(tmp_path, classes, names))
    found = in_browser(browser, page, SCRIPT, tmp_path)
    assert found["title"] == f"wfnet: {tmp_path.name}"  # no name of a class was run
    assert found["before"] == found["back"] == ["0", "1", "2"]
    assert found["worst"][0] == "20.00"
    assert found["best"][0] == "0.00"
    assert found["sorted"] == "ascending"
    assert found["names"][0] == EVIL
    assert found["names"][1:] == ["class 0", "class 1"]
    wanted = [name for name in names if "class 11" in name]
    assert found["search"] == wanted
    assert found["count"] == f"{len(wanted)} of {classes:,}"
    assert found["wide"] is False
    assert found["loaded"] == 0

"""A folder of a run as the commands write it, and the page parsed."""

import base64
import json
import math
from html.parser import HTMLParser

import pytest

from wfnet.evaluation import ClassRecord, EvaluationResult
from wfnet.trust import CHECKS, TrustRecord, TrustResult

EVIL = '</td><script>document.title="owned"</script><img src=x onerror="document.title=1">'
# One white pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8/5+hHgAHggJ/PchI7wAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Tags in order, ids, tables as rows of (data-value, text), and whether tags nest."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.open, self.tables, self.text = [], [], [], {}, ""
        self.rows, self.cell = None, None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        if tag not in ("meta", "img", "input", "br", "link"):
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(attrs.get("id", f"#{len(self.tables)}"), [])
        if tag == "tr":
            self.rows.append((attrs, []))
        if tag in ("td", "th"):
            self.cell = [attrs.get("data-value"), ""]
            self.rows[-1][1].append(self.cell)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += data
        if self.cell is not None:
            self.cell[1] += data


@pytest.fixture(scope="session")
def evil():
    return EVIL


@pytest.fixture(scope="session")
def parse():
    return lambda path: Page(path.read_text())


@pytest.fixture(scope="session")
def make_evaluation():
    def make(classes, names=None, **changes):
        same = {"original_acc_r": 0.71, "original_acc_r_top5": 0.9, "original_acc_f_top5": 0.95}
        same |= {"original_zrf": 0.34, "acc_r_top5": 0.9, "acc_f_top5": 0.1}
        records = []
        for k in range(classes):
            own = {
                "acc_r": 0.70 + 0.01 * math.sin(k),
                "acc_f": 0.2 if k % 70 == 3 else k / 1e5,
                "original_acc_f": 0.6 + 0.3 * math.cos(k),
                "zrf": 0.5 + k / 1e4,
            }
            name = names[k] if names else f"class {k}"
            counts = {"n_forget": 5 + k % 3, "n_retain": 5 * classes}
            records.append(ClassRecord(index=k, name=name, **counts, **same | own | changes))
        settings = {"num_classes": classes, "images": 5 * classes}
        return EvaluationResult.from_records(records, math.e, settings, 1.0)

    return make


@pytest.fixture(scope="session")
def make_trust():
    def make(values, retrained=None, settings=None, classes=(0,), names=None, **more):
        """The same values for every class: (check, measure) -> number, and the levels alike."""
        records = []
        for k in classes:
            for check in dict.fromkeys(check for check, _ in values):
                own, original, level = (
                    {name: v for (c, name), v in found.items() if c == check}
                    for found in (values, more.get("original", {}), retrained or {})
                )
                name = names[k] if names else f"class {k}"
                known = more.get("details", {"membership": {"standard_error": 0.025}})
                details = known.get(check, {})
                last = int(bool(retrained)), more.get("missing"), details, 1.0, f"{check}{k}"
                records.append(TrustRecord(k, name, check, own, original, level, {}, *last))
        return TrustResult(records, settings or {})

    return make


@pytest.fixture(scope="session")
def make_run(make_evaluation, make_trust):
    def make(folder, classes, names=None, trust=True):
        make_evaluation(classes, names).to_json(folder / "evaluation.json")
        if trust:
            headlines = [(check.name, check.headline) for check in CHECKS.values()]
            make_trust(
                dict.fromkeys(headlines, 0.9),
                dict.fromkeys(headlines, 0.1),
                {"samples": 10, "attackers_images": "in the natural mix"},
                range(0, classes, 2),
                names,
                original={h: 1.0 for h in headlines if h[0] in ("relearning", "collateral")},
                missing=f"A check: needs more (1 at hand); run `wfnet {EVIL}`",
            ).to_json(folder / "trust.json")
        options = {"model": f"net {EVIL}", "data": "some"}
        config = {"command": "untrain", "options": options, "versions": {"torch": "2.99"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "gates.png").write_bytes(PNG)
        (folder / "overview.png").write_bytes(PNG)
        return folder

    return make


@pytest.fixture
def run(tmp_path, make_run):
    return make_run(tmp_path, 12)

import http.client
import json
import re
import shutil
import subprocess
from threading import Thread

import pytest
import torch

import wfnet
from wfnet.cli import build_parser
from wfnet.cli.explore import Explorer, make_server
from wfnet.cli.inputs import Run
from wfnet.cli.option_files import fill_from_files


@pytest.fixture
def explored(digits_run):
    """An explorer, and a function that asks its server."""
    pytest.importorskip("PIL")
    words = ["explore", str(digits_run), "--port", "0", "--device", "cpu"]
    explorer = Explorer(Run(fill_from_files(build_parser(), words)))
    with make_server(explorer, 0) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()

        def ask(method, path, body=None, **headers):
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
            connection.request(method, path, body, headers)
            reply = connection.getresponse()
            content = reply.read()
            return reply.status, json.loads(content) if content[:1] == b"{" else content

        ask.port = server.server_port
        yield explorer, ask
        server.shutdown()
        thread.join()


def test_answers_are_those_of_the_network(explored, digits_run, small_network):
    explorer, ask = explored
    assert ask("GET", "/about") == (200, {"classes": [str(k) for k in range(10)], "images": 359})
    net = wfnet.WFNet.from_pretrained(digits_run, small_network())
    image = explorer.test[7][0][None]
    status, found = ask("POST", "/ask?forget=3,5&example=7")
    assert status == 200
    by_name = {c["name"]: c for c in found["classes"]}
    assert {name for name, c in by_name.items() if c["forgotten"]} == {"3", "5"}
    before, after = net(image)[0], net(image, torch.tensor([[3, 5]]))[0]
    for k in range(10):
        wanted = [before[k].item(), after[k].item()]
        assert by_name[str(k)]["logits"] == pytest.approx(wanted, abs=1e-4)
    closed = sum(layer["closed"] for layer in found["layers"])
    gates = torch.cat(list(net.gates().values()), 1)
    assert closed == int((gates[[3, 5]].prod(0) < 0.5).sum()) > 0
    assert len(found["alike"]) == 5
    assert ask("POST", "/ask?forget=&example=7")[1]["layers"] == []


def test_a_dropped_image_is_prepared_as_those_of_the_run(explored):
    explorer, ask = explored
    status, png = ask("GET", "/example/7")
    assert status == 200
    image = explorer.test[7][0]
    again = explorer.prepared(png)[0]
    # The picture that is shown is spread over all of black to white.
    assert (again - image).abs().max() < 0.05 * (image.max() - image.min())
    assert ask("POST", "/ask?forget=3", png)[0] == 200


def test_what_cannot_be_answered(explored):
    explorer, ask = explored
    explorer.untrained = [1, 3]
    for path, body, text in (
        ("/ask?forget=1,4&example=1", None, "class 4 was not untrained"),
        ("/ask?forget=3", b"abc", "no image that Pillow can read"),
        ("/ask?forget=10&example=1", None, "numbered 0 to 9"),
        ("/ask?forget=x&example=1", None, "invalid literal"),
    ):
        status, found = ask("POST", path, body)
        assert (status, text in found["error"]) == (400, True)
    assert ask("GET", "/other")[0] == 404
    assert ask("GET", "/about", Host="elsewhere.org")[0] == 403
    assert ask("POST", "/ask?example=1", **{"Sec-Fetch-Site": "cross-site"})[0] == 403


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium")
def test_the_page_in_a_browser(explored):
    _, ask = explored
    place = f"http://127.0.0.1:{ask.port}/#example=7&forget=3"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    words = ["chromium", *flags, "--dump-dom", place]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    rows = re.findall(r"<tr><td><span class=\"(\w*)\">(\d)</span>", done.stdout)
    assert len(rows) == 10
    assert [name for kind, name in rows if kind == "gone"] == ["3"]
    assert re.search(r"<td>\d+ of 8</td>", done.stdout)

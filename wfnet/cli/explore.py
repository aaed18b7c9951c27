"""a page in your browser: drop an image, choose classes, see what is forgotten

Serve one page on this machine, to its own browser alone: an image, the classes that it forgets,
logits before and after, the gates that close in each layer, and the rows most alike.

example:
  wfnet explore runs/r50
  wfnet explore demo --port 8080
"""

import argparse
import copy
import io
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import torch
from torch import Tensor

from wfnet.cli.inputs import Run
from wfnet.cli.options import Parser, add_command
from wfnet.data import TensorImages
from wfnet.data.encoded import EncodedImages
from wfnet.services import settings
from wfnet.services.extras import require

HOST = "127.0.0.1"
MAX_BYTES = 32 << 20  # of an image
SHOWN = 10  # classes, at most, in each list
CLOSED = 0.5  # a gate below this counts as closed


def add_parser(commands: argparse._SubParsersAction) -> Parser:
    parser = add_command(commands, run, "nothing is written", "RUN [options]")
    group = parser.group("page")
    port = settings.int_from(0, 65535)
    group.add_all("--port N  of the page; 0 is a free one [default: 8765]", port=port)
    group.add_seed("by which images are split where the run does not say it")
    parser.add_inputs(workers=0)
    return parser


def run(options: argparse.Namespace) -> None:
    server = make_server(Explorer(Run(options)), options.port)
    place = f"http://{HOST}:{server.server_port}/"
    print(f"open {place} in a browser of this machine; Ctrl-C ends it", flush=True)
    with server:
        server.serve_forever()


class Explorer:
    """Answers for one run: test images by number, and what an image is under some rows."""

    def __init__(self, work_on: Run):
        self.image = require("PIL.Image", "train")
        self.net, classifier = work_on.network()
        self.net.fuse = False  # one image at a time
        vars(work_on.options).update(cache=None, device="cpu")  # files are read as they are
        self.test = work_on.images(classifier).test
        self.names, self.untrained = self.test.classes, work_on.untrained
        # By layers; those of biases behind those of weights.
        shown = ((".alpha_weight", ""), (".alpha_bias", " (bias)"), (".gate", ""))
        self.gates = {}
        for name, gate in self.net.gates().items():
            for ending, text in shown:
                name = name.replace(ending, text) if name.endswith(ending) else name
            self.gates[name] = gate.detach().float().cpu()
        self.lock = Lock()  # one request at a time goes through the network

    def prepared(self, data: bytes) -> Tensor:
        """``[1, C, H, W]``: the image of a file, as the network takes it.

        Raises:
            ValueError: if it cannot be decoded.
        """
        if not isinstance(self.test, TensorImages | EncodedImages):
            raise ValueError("this data set prepares its images itself: take its test images")
        try:
            grey = self.test.channels == 1
            picture = self.image.open(io.BytesIO(data)).convert("L" if grey else "RGB")
        except (OSError, SyntaxError, self.image.DecompressionBombError) as error:
            raise ValueError(f"this is no image that Pillow can read: {error}") from error
        if not isinstance(self.test, TensorImages):
            return self.test.transform(picture)[None]
        alone, stored = copy.copy(self.test), self.test.images
        picture = picture.resize((stored.shape[3], stored.shape[2]))
        pixels = torch.from_numpy(np.array(picture)).reshape(1, *stored.shape[2:], -1)
        pixels = pixels.permute(0, 3, 1, 2)
        alone.images = pixels if stored.dtype == torch.uint8 else pixels / 255
        return alone.batch(torch.tensor([0])).images

    @torch.inference_mode()
    def answer(self, image: Tensor, forget: list[int]) -> dict[str, Any]:
        """Logits and probabilities before and after, closed gates by layer, and rows alike.

        Raises:
            ValueError: for a class that the run did not untrain: its row changes nothing.
        """
        for label in forget:
            if self.untrained is not None and label not in self.untrained:
                raise ValueError(
                    f"class {label} was not untrained in this run, which has classes "
                    f"{', '.join(map(str, self.untrained))}: choose among these"
                )
        weight = next(self.net.parameters())
        image = image.to(weight.device, weight.dtype)
        rows = torch.tensor([forget or [-1]], device=weight.device)
        with self.lock:
            logits = torch.cat([self.net(image, None), self.net(image, rows)]).double().cpu()
        best = logits.topk(min(SHOWN, logits.shape[1])).indices.flatten().tolist()
        chances = logits.softmax(1)
        return {
            "classes": [
                {"name": self.names[k], "forgotten": k in forget}
                | {"logits": logits[:, k].tolist(), "chances": chances[:, k].tolist()}
                for k in sorted({*best, *forget}, key=lambda k: -float(logits[0, k]))
            ],
            "layers": [
                {"name": n, "closed": int((g[forget].prod(0) < CLOSED).sum()), "of": g.shape[1]}
                for n, g in self.gates.items()
                if forget
            ],
            "alike": self.alike(forget),
        }

    def alike(self, forget: list[int]) -> list[dict[str, Any]]:
        """The rows whose gates resemble those of the classes most: cosine of ``gate - 1``."""
        if not forget:
            return []
        moved = torch.cat(list(self.gates.values()), 1) - 1
        own = torch.cat([gate[forget].prod(0) for gate in self.gates.values()]) - 1
        cosine = torch.cosine_similarity(moved, own[None])
        order = [k for k in cosine.argsort(descending=True).tolist() if k not in forget]
        return [{"name": self.names[k], "cosine": float(cosine[k])} for k in order[:5]]

    def example(self, number: int) -> bytes:
        """A test image as PNG, its values spread over 0 to 255."""
        image = self.test[number % len(self.test)][0]
        low, high = torch.aminmax(image)
        pixels = ((image - low) / (high - low).clamp_min(1e-6) * 255).byte().permute(1, 2, 0)
        file = io.BytesIO()
        self.image.fromarray(pixels.squeeze(2).numpy()).save(file, "PNG")
        return file.getvalue()


def make_server(explorer: Explorer, port: int) -> ThreadingHTTPServer:
    """A server of the page and its three questions, for this machine alone."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if not self._is_local():
                return
            if path == "/":
                page = files("wfnet.cli").joinpath("explore.html").read_bytes()
                self._send(page, "text/html; charset=utf-8")
            elif path == "/about":
                self._send_json({"classes": explorer.names, "images": len(explorer.test)})
            elif path.startswith("/example/") and path[9:].isdecimal():
                self._send(explorer.example(int(path[9:])), "image/png")
            else:
                self._send_json({"error": "there is no such page"}, 404)

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if not self._is_local():
                return
            try:
                if size > MAX_BYTES:
                    raise ValueError(f"the image has more than {MAX_BYTES >> 20} MiB")
                question = parse_qs(urlsplit(self.path).query)
                forget = sorted({int(k) for k in question.get("forget", [""])[0].split(",") if k})
                if forget and not 0 <= forget[0] <= forget[-1] < len(explorer.names):
                    raise ValueError(f"classes are numbered 0 to {len(explorer.names) - 1}")
                if "example" in question:
                    number = int(question["example"][0]) % len(explorer.test)
                    image = explorer.test[number][0][None]
                else:
                    image = explorer.prepared(self.rfile.read(size))
                self._send_json(explorer.answer(image, forget))
            except ValueError as error:
                self._send_json({"error": str(error)}, 400)

        def _is_local(self) -> bool:
            """Whether a page of this server asks: pages of others must not, through a browser."""
            known = (self.headers.get("Host") or "").split(":")[0] in (HOST, "localhost")
            if not known or self.headers.get("Sec-Fetch-Site") == "cross-site":
                self._send_json({"error": f"ask for http://{HOST}"}, 403)
                return False
            return True

        def _send_json(self, content: object, status: int = 200) -> None:
            self._send(json.dumps(content).encode(), "application/json", status)

        def _send(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", "default-src 'self' 'unsafe-inline' blob:")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *about: object) -> None:
            pass

    return ThreadingHTTPServer((HOST, port), Handler)

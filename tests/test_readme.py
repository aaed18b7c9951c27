"""What the documents tell a reader to type runs, or is a command that there is."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from wfnet import UntrainConfig
from wfnet.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a document."""
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


def test_python_blocks_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    for package in ("sklearn", "timm"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    first, *others = blocks(DOCUMENTS[0], "python")
    names = {}
    exec(first, names)
    assert names["data"].name == "digits"
    mean = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mean"))
    acc_r, acc_f = map(float, mean.split()[4:6])
    assert acc_r > 97
    assert acc_f < 3
    recipe = UntrainConfig.recipe
    monkeypatch.setattr(UntrainConfig, "recipe", lambda name: recipe(name, steps=2))
    for block in others:
        exec(block, names)
    assert names["durable"].gate == "durable"
    assert (tmp_path / "filters").is_dir()


LINES = [
    line
    for path in DOCUMENTS
    for block in blocks(path, "sh")
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("line", LINES)
def test_shell_lines_are_commands_with_options_that_there_are(line):
    command, *words = shlex.split(line, comments=True)
    command = command.removeprefix(".venv/bin/")
    if command == "torchrun":
        command, words = "wfnet", words[words.index("wfnet") + 1 :]
    if command == "wfnet":
        assert build_parser().parse_args(words).command == words[0]
    elif command == "make":
        dry = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
    elif command.endswith("python"):
        assert (ROOT / words[0]).is_file()
    else:
        assert command == "pip"


def test_links_and_pictures_are_there():
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"

"""benchmarks/device_run.py without a device: what hangs, crashes, is out of time, or goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench_data
import bench_eval
import bench_ops
import bench_plan
import bench_scaling
import bench_step
import device_run
import device_setup
import device_smoke
import profile_layers
import whole_run
from device_run import Part, Stage

ROOT = Path(__file__).parent.parent


def stage(name, *programs, limit=30.0, minutes=0.001, at_once=1, **options):
    """A stage whose parts are Python programs."""
    parts = tuple(
        Part(f"{name}{number}", (sys.executable, "-c", program))
        for number, program in enumerate(programs)
    )
    return Stage(name, "for a test", minutes, limit, parts, at_once, **options)


def run(tmp_path, *made, arguments=(), name="out"):
    """Exit status and summary of a run of ``made``."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = device_run.main(
            ["--output", str(tmp_path / name), *arguments], lambda rehearse: list(made)
        )
    finally:
        signal.signal(signal.SIGTERM, before)
    return status, json.loads((tmp_path / name / "summary.json").read_text())


def test_goes_on_after_a_failure_and_shows_the_end_of_its_log(tmp_path, capsys):
    status, summary = run(
        tmp_path,
        stage("bad", "print('x' * 9, flush=True); raise SystemExit(3)", "print('fine')"),
        stage("good", "pass"),
    )
    assert status == 1
    bad, good = summary["stages"]
    assert (bad["status"], good["status"]) == ("failed", "passed")
    assert (bad["parts"][0]["exit_code"], bad["parts"][0]["tail"]) == (3, ["x" * 9])
    assert "tail" not in bad["parts"][1]
    assert (tmp_path / "out" / bad["parts"][1]["log"]).read_text() == "fine\n"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "1 of 2; bad0 (status 3)" in lines[0]


def test_a_crash_is_named(tmp_path, capsys):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    _, summary = run(tmp_path, stage("crash", crash), stage("after", "pass"))
    assert summary["stages"][0]["parts"][0]["exit_code"] == -signal.SIGSEGV
    assert summary["stages"][1]["status"] == "passed"
    assert "SIGSEGV" in capsys.readouterr().out


def test_what_hangs_is_killed_with_its_children_and_leaves_its_stack(tmp_path, monkeypatch):
    monkeypatch.setattr(device_run, "_GRACE", 1.0)
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    hang = (
        "import subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print(child.pid, flush=True)\n"
        "def waits_forever():\n    time.sleep(60)\n"
        "waits_forever()\n"
    )
    start = time.monotonic()
    _, summary = run(tmp_path, stage("hang", hang, limit=2.0), stage("after", "pass"))
    assert time.monotonic() - start < 20
    hung, after = summary["stages"]
    assert hung["status"] == "out of time"
    assert after["status"] == "passed"
    assert any("waits_forever" in line for line in hung["parts"][0]["tail"])
    assert not _runs(int(hung["parts"][0]["tail"][0]))


def _runs(pid):
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_part_that_hangs_leaves_the_next_ones_their_share(tmp_path):
    slow = "import time; time.sleep(60)"
    start = time.monotonic()
    _, summary = run(tmp_path, stage("half", slow, "pass", "pass", limit=6.0))
    assert time.monotonic() - start < 20
    parts = summary["stages"][0]["parts"]
    assert [part["status"] for part in parts] == ["out of time", "passed", "passed"]


def test_a_spent_budget_leaves_the_rest_for_later(tmp_path):
    slow = "import time; time.sleep(60)"
    status, summary = run(
        tmp_path,
        stage("slow", slow, slow, minutes=0.01),
        stage("never", "pass", minutes=1),
        arguments=["--budget", "2"],
    )
    assert status == 1
    slow, never = summary["stages"]
    assert [part["status"] for part in slow["parts"]] == ["out of time", "out of time"]
    assert (never["status"], never["parts"]) == ("no time left", [])
    assert summary["seconds"] < 15


def test_parts_run_side_by_side(tmp_path):
    meet = (
        "import pathlib, sys, time\n"
        f"folder = pathlib.Path({str(tmp_path)!r})\n"
        "(folder / 'NAME').touch()\n"
        "while not (folder / 'OTHER').exists(): time.sleep(0.01)\n"
    )
    both = stage("both", meet.replace("NAME", "a").replace("OTHER", "b"),
                 meet.replace("NAME", "b").replace("OTHER", "a"), at_once=2)  # fmt: skip
    assert run(tmp_path, both)[0] == 0


def test_a_later_run_skips_what_passed_of_the_same_sources(tmp_path, monkeypatch):
    made = stage("good", "pass"), stage("bad", "raise SystemExit(1)")
    run(tmp_path, *made, name="first")
    before = str(tmp_path / "first" / "summary.json")
    status, summary = run(
        tmp_path, made[0], stage("bad", "pass"), arguments=["--continue", before], name="second"
    )
    assert status == 0
    assert [(s["name"], s.get("kept", False)) for s in summary["stages"]] == [
        ("good", True), ("bad", False),
    ]  # fmt: skip
    assert not (tmp_path / "second" / "logs" / "good0.log").exists()
    monkeypatch.setattr(device_run, "sources_digest", lambda: "others")
    with pytest.raises(SystemExit, match="is of other sources"):
        run(tmp_path, *made, arguments=["--continue", before], name="third")
    with pytest.raises(SystemExit, match="not the summary of a run"):
        device_run.kept_stages(tmp_path / "nothing.json")


def test_an_earlier_run_is_not_overwritten(tmp_path, capsys):
    run(tmp_path, stage("good", "pass"))
    with pytest.raises(SystemExit):
        run(tmp_path, stage("good", "pass"))
    assert "holds an earlier run" in capsys.readouterr().err


RUNNER = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import device_run
program = (
    "import json, os, pathlib, sys, time\\n"
    "pathlib.Path(sys.argv[1], 'partial.json').write_text(json.dumps([os.getpid()]))\\n"
    "time.sleep(60)"
)
part = device_run.Part("part", (sys.executable, "-c", program, "{results}"))
stages = [device_run.Stage("long", "for a test", 0.1, 60, (part,))]
sys.exit(device_run.main(None, lambda rehearse: stages))
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_runner_that_is_ended_leaves_its_results_and_no_process(tmp_path, how):
    archive = tmp_path / "device.tar.gz"
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(ROOT / "benchmarks"), "--output", str(tmp_path / "out"),
         "--archive", str(archive)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    partial = tmp_path / "out" / "results" / "partial.json"
    for _ in range(400):
        if partial.exists() and partial.stat().st_size:
            break
        time.sleep(0.05)
    (pid,) = json.loads(partial.read_text())
    runner.send_signal(how)
    printed, _ = runner.communicate(timeout=20)
    for _ in range(100):
        if not _runs(pid):
            break
        time.sleep(0.05)
    assert not _runs(pid)
    (record,) = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    assert partial.exists()
    if how is signal.SIGKILL:
        assert record["status"] == "running"
        return
    assert runner.returncode == 128 + how
    assert record["status"] == "interrupted"
    assert f"stopped by {how.name}" in printed
    with tarfile.open(archive) as tar:
        assert "results/partial.json" in tar.getnames()


def test_the_environment_comes_first_and_ends_the_run_if_it_fails(tmp_path, capsys):
    status, summary = run(
        tmp_path, stage("eval", "pass"), stage("environment", "raise SystemExit('no device')"),
        arguments=["--stages", "eval"],
    )  # fmt: skip
    assert status == 1
    assert [s["name"] for s in summary["stages"]] == ["environment"]
    assert "nothing can run" in capsys.readouterr().out


def test_a_rehearsed_stage_has_results(tmp_path):
    """One of the real ones, with what belongs beside its numbers."""
    real = {made.name: made for made in device_run.stages(rehearse=True)}
    status, summary = run(tmp_path, real["environment"], real["eval"], arguments=["--rehearse"])
    assert status == 0, summary
    assert summary["rehearsal"]
    assert {"device", "torch", "commit", "driver"} <= summary["machine"].keys()
    result = json.loads((tmp_path / "out" / "results" / "eval.json").read_text())
    assert result["pairs"] == 20


def test_errors_of_kernels_are_summed_up_as_the_run_goes_on(tmp_path):
    command = device_run.python(
        "benchmarks/device_smoke.py", "eager", "gates", "--device", "cpu", "--dtypes", "float32",
        "--output", "{results}/smoke-eager-gates.json",
    )  # fmt: skip
    ends = Part("smoke-eager-conv", (sys.executable, "-c", "raise SystemExit(3)"))
    archive = tmp_path / "device.tar.gz"
    run(tmp_path, Stage("smoke", "", 0.01, 60, (Part("smoke-eager-gates", command), ends)),
        arguments=["--archive", str(archive)])  # fmt: skip
    content = json.loads((tmp_path / "out" / "results" / "numerics.json").read_text())
    assert {row["family"] for row in content["rows"]} == {"gates"}
    assert content["unfinished"] == [
        {"name": "smoke-eager-conv", "reason": "ended with status 3"},
    ]  # fmt: skip
    with tarfile.open(archive) as tar:
        assert "results/numerics.json" in tar.getnames()


# -- the real stages -------------------------------------------------------------------------------

PARSERS = {
    "bench_data.py": bench_data.parse,
    "bench_eval.py": bench_eval.parse,
    "bench_ops.py": bench_ops.parse,
    "bench_scaling.py": bench_scaling.parse,
    "bench_plan.py": bench_plan.parse,
    "bench_step.py": bench_step.parse,
    "device_setup.py": device_setup.parse,
    "device_smoke.py": device_smoke.parse,
    "profile_layers.py": profile_layers.parse,
    "first_steps.py": lambda words: words == [] or pytest.fail(f"no steps {words}"),
    "whole_run.py": whole_run.parse,
    "sanitized.py": lambda words: words == [] or pytest.fail(f"sanitized.py takes no {words}"),
}


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_command_line_is_valid(rehearse):
    checked = set()
    for made in device_run.stages(rehearse):
        for part in made.parts:
            words = list(part.command)
            place = words.index(sys.executable)
            script, arguments = words[place + 1], words[place + 2 :]
            if script == "-m":
                assert arguments[0] == "pytest"
                continue
            assert (ROOT / script).is_file(), script
            PARSERS[Path(script).name](arguments)
            checked.add(Path(script).name)
    on_devices = {"sanitized.py", "first_steps.py"}
    assert checked == (PARSERS.keys() - on_devices if rehearse else PARSERS.keys())


def test_names_of_stages_and_parts_are_unique():
    made = device_run.stages()
    assert len({one.name for one in made}) == len(made)
    parts = [part.name for one in made for part in one.parts]
    assert len(set(parts)) == len(parts)
    assert {one.name for one in made} >= set(device_run.ALWAYS)


def test_every_device_test_is_in_exactly_one_group():
    listed = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-m", "gpu", "-p",
         "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    tests = [line.removeprefix("tests/gpu/") for line in listed.splitlines() if "::" in line]
    assert len(tests) > 100
    groups = list(device_run.TESTS.values())
    for test in tests:
        file, _, name = test.partition("::")
        if file in device_run.NO_GROUP:
            continue
        names = f"{file} {name}"  # -k also looks at the file's name
        chosen = [
            expression
            for group_file, expression in groups
            if group_file == file and Expression.compile(expression).evaluate(names.__contains__)
        ]
        assert len(chosen) == 1, f"{test} is in {chosen}"


@pytest.mark.parametrize(("answer", "images"), [("143771", 256), ("81559", 128), ("?", 256)])
def test_steps_are_smaller_where_their_peers_do_not_fit(monkeypatch, answer, images):
    def nvidia_smi(command, **options):
        assert command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, 0, stdout=f"{answer}\n")

    monkeypatch.setattr(device_run.subprocess, "run", nvidia_smi)
    device_run.images_of_a_step.cache_clear()
    try:
        made = {part.name: part.command for one in device_run.stages() for part in one.parts}
    finally:
        device_run.images_of_a_step.cache_clear()
    for name in ("step-vgg16", "steps-resnet18-cuda", "compiled-resnet50", "plan-vgg16",
                 "profile-resnet50-cuda"):  # fmt: skip
        assert made[name][made[name].index("-b") + 1] == str(images), name


def test_kernels_that_failed_are_left_out():
    made = {part.name: part for one in device_run.stages() for part in one.parts}
    step = made["steps-resnet18-triton"]
    assert device_run.without(step, set()) == step
    assert device_run.without(step, {"triton"}) == "triton failed their first run"
    hopper = device_run.without(made["compiled-resnet18"], {"cuda-hopper"})
    assert hopper.environment["WFNET_CUDA_HOPPER"] == "0"
    assert "wfnet/cuda/captured" in hopper.command
    both = device_run.without(made["compiled-resnet18"], {"triton", "cuda-portable", "cuda-hopper"})
    assert [word for word in both.command if word.startswith("wfnet/")] == [
        "wfnet/eager/compiled", "wfnet/auto/captured", "wfnet/eager/compiled_captured",
    ]  # fmt: skip
    profile = made["profile-resnet50-cuda"]
    assert device_run.without(profile, {"cuda-portable"}) == "cuda failed their first run"
    assert device_run.without(profile, {"cuda-hopper"}).command == profile.command
    whole = device_run.without(made["whole-1000-resnet50"], {"cuda-portable", "triton"})
    assert whole_run.parse(list(whole.command[2:])).column == "wfnet/eager/compiled_captured"
    ops = device_run.without(made["ops"], {"cuda-portable"})
    assert ops.command[-4:] == ("--providers", "eager", "unmasked", "triton")


def test_smoke_parts_decide_what_is_measured(tmp_path):
    """A part with `checks` that fails takes its kernels out of the stages that measure."""
    checks = Part("triton-conv", (sys.executable, "-c", "raise SystemExit(1)"), checks="triton")
    measured = Part("m", ("true", "--columns", "eager", "wfnet/triton/fused"))
    status, summary = run(
        tmp_path, Stage("smoke", "", 0.01, 20, (checks,)),
        Stage("step", "", 0.01, 20, (measured,), measures=True),
    )  # fmt: skip
    assert status == 1
    assert summary["stages"][1]["without"] == ["triton"]
    assert summary["stages"][1]["parts"] == [
        {"name": "m", "status": "left out", "note": "triton failed their first run"}
    ]


def test_list_and_bad_arguments(tmp_path, capsys):
    assert device_run.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(made.name in shown for made in device_run.stages())
    for arguments in (["--stages", "magic"], ["--budget", "0"]):
        with pytest.raises(SystemExit):
            device_run.parse([*arguments, "--output", str(tmp_path)])
        assert "error:" in capsys.readouterr().err


def test_make_device_passes_its_arguments():
    shown = subprocess.run(
        ["make", "-n", "--no-print-directory", "device", "OUT=there", "BUDGET=60",
         "ARGS=--stages eval"],
        cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "MAKEFLAGS": ""},
    ).stdout  # fmt: skip
    words = shlex.split(shown.splitlines()[-1])
    options = device_run.parse(words[words.index("benchmarks/device_run.py") + 1 :])
    assert (options.output.name, options.budget, options.stages) == ("there", 60, ["eval"])


def test_a_checkout_is_importable_where_pip_cannot_install_it(tmp_path):
    """As an editable installation: kernels/ lies beside the package."""
    root, packages = tmp_path / "checkout", tmp_path / "site-packages"
    for name, text in (("wfnet", "from wfnet.kernels import WORD"), ("kernels", "WORD = 'here'")):
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text(text + "\n")
    (root / "wfnet" / "inner.py").write_text("WORD = 'inner'\n")
    packages.mkdir()
    device_setup.place(packages, root)
    code = f"import site; site.addsitedir({str(packages)!r}); import wfnet, wfnet.inner; "
    code += "print(wfnet.WORD, wfnet.inner.WORD, wfnet.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["here", "inner", str(root / "wfnet/__init__.py")]

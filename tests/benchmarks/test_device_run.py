"""benchmarks/device_run.py without a device: what hangs, crashes, is out of time, or goes on."""

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import device_run
import pytest
import whole_run
from _pytest.mark.expression import Expression
from device_run import Stage, plan

from wfnet.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]


def stage(name, code, limit=60.0, **options):
    return Stage(name, (sys.executable, "-c", code, "{results}"), limit, **options)


def run(folder, *stages, arguments=()):
    """Status and the stages of the summary, by name."""
    status = device_run.main(["--output", str(folder), *arguments], list(stages))
    summary = json.loads((folder / "summary.json").read_text())
    return status, {record["name"]: record for record in summary["stages"]}


def runs(pid):
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_crash_costs_no_other_stage(tmp_path):
    write = "import pathlib, sys; pathlib.Path(sys.argv[1], 'made.json').write_text('{}')"
    status, stages = run(
        tmp_path,
        stage("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        stage("error", "print('a word'); raise SystemExit(3)"),
        Stage("missing", (str(tmp_path / "no-such-program"),), 10),
        stage("after", write),
    )
    assert status == 1
    assert (stages["crash"]["status"], stages["crash"]["note"]) == ("failed", "SIGSEGV")
    assert (stages["error"]["exit_code"], stages["error"]["tail"]) == (3, ["a word"])
    assert "not started" in stages["missing"]["tail"][0]
    assert stages["after"]["status"] == "passed"
    with tarfile.open(f"{tmp_path}.tar.gz") as tar:
        assert {"./summary.json", "./logs/error.log", "./results/made.json"} <= {*tar.getnames()}


def test_what_hangs_is_killed_with_its_children_and_leaves_its_stack(tmp_path, monkeypatch):
    monkeypatch.setattr(device_run, "_GRACE", 1.0)
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    hang = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {ignore + 'time.sleep(60)'!r}])\n"
        "print(child.pid, flush=True)\n"
        "def waits_forever():\n    time.sleep(60)\n"
        "waits_forever()\n"
    )
    start = time.monotonic()
    _, stages = run(tmp_path, stage("hang", hang, limit=3.0), stage("after", "pass"))
    assert time.monotonic() - start < 30
    assert stages["hang"]["status"] == "out of time"
    assert stages["after"]["status"] == "passed"
    assert any("waits_forever" in line for line in stages["hang"]["tail"])
    assert not runs(int(stages["hang"]["tail"][0]))


def test_a_spent_budget_ends_a_run_that_stays_as_it_is(tmp_path):
    slow = stage("slow", "import time; time.sleep(60)", limit=8)
    quick, never = stage("quick", "pass", limit=8), stage("never", "pass")
    status, stages = run(tmp_path, quick, slow, never, arguments=["--budget", "5"])
    assert status == 1
    statuses = {name: record["status"] for name, record in stages.items()}
    assert statuses == {"quick": "passed", "slow": "out of time", "never": "no time left"}
    with pytest.raises(SystemExit, match="holds a run; choose another --output"):
        run(tmp_path, quick)


def test_a_failed_need_leaves_out_what_rests_on_it_and_nothing_else(tmp_path):
    """One out of time does not: a kernel that is slow to compile is no wrong one."""
    _, stages = run(
        tmp_path,
        stage("forward", "raise SystemExit(1)"),
        stage("gradient", "import time; time.sleep(60)", limit=2),
        stage("left", "pass", needs=("gradient", "forward")),
        stage("other", "pass", needs=("gradient", "nothing")),
    )
    assert (stages["left"]["status"], stages["left"]["note"]) == ("left out", "forward failed")
    assert stages["other"]["status"] == "passed"
    failing = stage("facts", "raise SystemExit('no device')")
    status, stages = run(tmp_path / "facts", failing, stage("eval", "pass"))
    assert (status, list(stages)) == (1, ["facts"])


def test_a_runner_that_is_ended_leaves_its_results_and_no_process(tmp_path):
    write = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1], 'p').write_text('made'); "
    end = "print(os.getpid(), flush=True); os.kill(os.getppid(), 15); time.sleep(60)"
    runner = os.fork()
    if not runner:
        try:
            run(tmp_path, stage("long", write + end))
        finally:
            os._exit(1)
    os.waitpid(runner, 0)
    assert not runs(int((tmp_path / "logs/long.log").read_text().split()[0]))
    (record,) = json.loads((tmp_path / "summary.json").read_text())["stages"]
    assert record["status"] == "interrupted"
    with tarfile.open(f"{tmp_path}.tar.gz") as tar:
        assert "./results/p" in tar.getnames()


# -- the real stages -------------------------------------------------------------------------------


def test_every_stage_is_a_valid_command_line():
    stages, checked = plan(), set()
    names = [one.name for one in stages]
    assert len(set(names)) == len(names)
    assert names[:2] == list(device_run.FIRST)
    for one in stages:
        assert set(one.needs) <= set(names[: names.index(one.name)])
        words = one.command[one.command.index(sys.executable) + 1 :]
        if words[:4] == ("-P", "-m", "wfnet", "bench"):
            options = build_parser().parse_args(list(words[3:]))
            assert options.output.endswith(f"{one.name}.json")
            checked.add("bench")
        elif words[0] != "-P":
            assert words[0] == "benchmarks/whole_run.py"
            whole_run.parse(list(words[1:]))
            checked.add("whole_run")
    assert checked == {"bench", "whole_run"}


def test_every_device_test_is_in_exactly_one_group():
    command = [sys.executable, "-m", "pytest", "tests/gpu", "--collect-only", "-m", "gpu", "-p"]
    listed = subprocess.run(
        [*command, "no:cacheprovider"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    tests = [line.removeprefix("tests/gpu/") for line in listed.splitlines() if "::" in line]
    assert len(tests) > 100

    def chosen(test, groups):
        file, _, name = test.partition("::")
        names = f"{file} {name}"  # -k also looks at the file's name
        return [
            expression
            for group_file, expression in groups.values()
            if group_file == file and Expression.compile(expression).evaluate(names.__contains__)
        ]

    for test in tests:
        assert len(chosen(test, device_run.TESTS)) == 1, test
    smoked = [group for test in tests for group in chosen(test, device_run.SMOKE)]
    assert set(smoked) == {expression for _, expression in device_run.SMOKE.values()}

"""gmscale doctor: honest findings, a remedy for each failure, an exit status."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import warm

from gmscale import doctor
from gmscale.doctor import machine
from gmscale.doctor.finding import Finding
from gmscale.errors import UsageError


@pytest.fixture
def warm_torchrun(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let doctor's torchrun begin at once; tests/test_readme.py runs it as a user does."""
    folder, run = tmp_path_factory.mktemp("doctor"), subprocess.run

    def run_warm(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if "torch.distributed.run" not in command:
            return run(command, **options)
        program = warm.Program(folder / "log", command[1:], folder, options["env"])
        return subprocess.CompletedProcess(command, program.wait(), "", program.output)

    monkeypatch.setattr(machine.subprocess, "run", run_warm)


@pytest.mark.usefixtures("warm_torchrun")
def test_a_healthy_machine_is_reported_as_such(tmp_path, capsys):
    assert doctor.main(["--dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok") and "gloo all-reduce" in line for line in lines)
    assert any(line.startswith("ok") and "torch " in line for line in lines)
    assert not any(line.startswith("FAIL") for line in lines)


def test_every_failure_comes_with_a_remedy_and_status_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        machine, "_all_reduce", lambda backend, processes: Finding(backend, False, "no answer", "cure")
    )
    missing = tmp_path / "missing"
    assert doctor.main(["--dir", str(missing)]) == 1
    out = capsys.readouterr().out
    assert f"{missing}: No such file or directory" in out
    assert "choose a writable --run.dir" in out
    assert "-> cure" in out


@pytest.mark.usefixtures("warm_torchrun")
def test_a_failing_all_reduce_is_noticed(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    finding = machine._all_reduce("gloo", processes=1)
    assert not finding.ok
    assert "GLOO_SOCKET_IFNAME" in finding.remedy


@pytest.mark.parametrize("name", ["torch", "timm"])
def test_a_missing_or_old_package_fails(monkeypatch, name):
    monkeypatch.setattr(machine, "package_version", lambda package: "2.1.0" if package == "torch" else None)
    findings = {f.name: f for f in machine._versions()}
    assert not findings[name].ok
    assert "constraints.txt" in findings[name].remedy


def test_a_full_disk_fails(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    assert not machine._writable(tmp_path).ok


def test_an_unknown_flag_is_one_line():
    with pytest.raises(UsageError, match="unrecognized arguments: --foo"):
        doctor.main(["--foo"])


def test_a_flag_of_launch_without_launch_is_one_line():
    with pytest.raises(UsageError, match="--nnodes goes with --launch"):
        doctor.main(["--nnodes", "2"])

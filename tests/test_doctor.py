"""`hf-transfer doctor`: each check says what is wrong and how to mend it, and none of them hides the others."""

import json
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from hf_transfer import capability, doctor, threads
from hf_transfer.cli import main
from hf_transfer.doctor import CHECKS, Finding, Status, examine, format_page
from hf_transfer.locations import store_dir
from tests.hub_server import HubServer
from tests.test_publish import TOKENS, signed_in


def run_check(topic: str) -> Finding:
    (finding,) = examine({topic: CHECKS[topic]})
    assert (finding.remedy != "") == (finding.status is not Status.OK)
    return finding


def test_the_command_prints_every_check_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, self-test included, offline."""
    main(["doctor", "--json"])
    page = json.loads(capsys.readouterr().out)
    findings = {finding["topic"]: finding for finding in page["findings"]}
    assert findings.keys() == CHECKS.keys()
    assert page["status"] != "problem"
    assert findings["self-test"]["facts"]["test_accuracy"] > 0.5
    assert findings["devices"]["facts"]["num_cores"] >= 1
    assert findings["versions"]["facts"]["torch"]
    assert findings["hub"]["facts"]["offline"]
    assert "multi_cpu.yaml" in findings["recipes"]["text"]


def test_a_broken_cache_is_a_problem_with_a_remedy_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(doctor, "CHECKS", {topic: CHECKS[topic] for topic in ("cache", "recipes")})
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    page = " ".join(capsys.readouterr().out.split())
    assert page.startswith("problem cache")
    assert "cannot be written to" in page
    assert "Remedy: set HF_TRANSFER_CACHE to a folder that you may write to" in page
    assert page.endswith("1 ok, 0 warning, 1 problem")


def test_a_writable_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TRANSFER_CACHE", str(tmp_path / "new"))
    finding = run_check("cache")
    assert finding.facts["nbytes"] == 0
    assert finding.facts["free_bytes"] > 0
    monkeypatch.setattr(doctor, "LITTLE_DISK_BYTES", 10**18)
    assert run_check("cache").status is Status.WARNING
    (store_dir() / "abc").mkdir(parents=True)
    (store_dir() / "abc" / "meta.json").write_text("{}")
    assert run_check("cache").remedy == "`hf-transfer cache --clear abc`"


def test_a_check_that_raises_an_error_does_not_stop_the_others() -> None:
    def fail() -> Sequence[Finding]:
        raise ImportError("libtorch.so is missing")

    first, second = examine({"devices": fail, "recipes": CHECKS["recipes"]})
    assert (first.status, second.status) == (Status.PROBLEM, Status.OK)
    assert "ImportError: libtorch.so is missing" in format_page([first])


@pytest.mark.parametrize(
    ("token", "status", "words"),
    [
        (None, Status.OK, "not logged in"),
        ("hf_alice", Status.OK, "logged in as alice, with a token of the role write"),
        ("hf_revoked", Status.PROBLEM, "refuses the stored token"),
    ],
)
def test_the_hub_is_asked_for_the_account(token: str | None, status: Status, words: str, tmp_path: Path) -> None:
    with HubServer(TOKENS) as hub, signed_in(hub, tmp_path, token):
        finding = run_check("hub")
        assert hub.url in finding.text
    assert finding.status is status
    assert words in finding.text
    assert "hf_" not in finding.text + json.dumps(finding.facts).replace("hf_transfer", "")


def test_a_hub_that_fails_or_is_not_there_is_a_warning(tmp_path: Path) -> None:
    with HubServer(TOKENS) as hub, signed_in(hub, tmp_path, None):
        hub.faults[0] = 503
        assert "status 503" in run_check("hub").text
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            hub.url = f"http://127.0.0.1:{unused.getsockname()[1]}"  # bound, but nobody listens
            with signed_in(hub, tmp_path, None):
                finding = run_check("hub")
    assert finding.status is Status.WARNING
    assert "cannot be reached" in finding.text


def test_missing_and_old_packages_are_problems_with_the_command_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["torch>=99", "no-such-package>=1.2", "numpy", "also-missing>=1; extra == 'trackers'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: requirements)
    summary, old, missing = examine({"versions": CHECKS["versions"]})
    assert summary.status is Status.OK
    assert (old.status, old.remedy) == (Status.PROBLEM, "python -m pip install --upgrade 'torch>=99'")
    assert "no-such-package is not installed" in missing.text


def test_the_names_of_the_download_accelerator_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_check("name").status is Status.OK
    (tmp_path / "hf-transfer").touch(mode=0o755)
    assert "of another environment" in run_check("name").text
    monkeypatch.setenv("HF_HUB_ENABLE_HF_TRANSFER", "1")
    assert run_check("name").remedy == "unset HF_HUB_ENABLE_HF_TRANSFER"


@pytest.mark.parametrize(("cores", "status"), [(1000, Status.WARNING), (None, Status.OK)])
def test_idle_cores_are_a_warning(cores: int | None, status: Status, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(threads, "count_physical_cores", lambda: cores or torch.get_num_threads())
    assert run_check("threads").status is status


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capability, "limit_memory", lambda memory_bytes, root: 10**9)
    assert run_check("memory").status is Status.WARNING

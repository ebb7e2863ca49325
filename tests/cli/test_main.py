"""The command line as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tlcore
from tlcore.__main__ import main
from tlcore.hotpath.native import in_use


def run(*args: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tlcore", *args]
    environment = {**os.environ, **variables}
    return subprocess.run(
        command, input=stdin, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_do_not_import_torch(flag: str) -> None:
    code = (
        "import sys\nfrom tlcore.__main__ import main\n"
        f"try: main([{flag!r}])\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'jsonschema', 'rich', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_help_lists_the_commands_and_version_is_the_package_s() -> None:
    done = run("--help")
    assert all(name in done.stdout for name in ("ls", "show", "check-config"))
    version, half = run("--version").stdout.splitlines()
    assert version == f"tlcore {tlcore.__version__}" and half == in_use()
    assert "TLCORE_NO_EXTENSIONS is set" in run("--version", TLCORE_NO_EXTENSIONS="1").stdout


def test_a_command_is_required_and_must_exist() -> None:
    assert run().returncode == 2
    assert "invalid choice" in run("chekc-config").stderr


def test_check_config_prints_the_normal_form(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"log_step_ids": "[3]", "module_call_match": "a:0"}')
    for done in (run("check-config", str(file)), run("check-config", "-", stdin=file.read_text())):
        document = json.loads(done.stdout)
        assert done.returncode == 0
        assert (document["log_step_ids"], document["module_call_match"]) == ([3], ["a:0"])
    assert json.loads(run("check-config", " {}").stdout)["backend"] == "pt"


def test_check_config_prints_every_problem() -> None:
    done = run("check-config", '{"enabld": true, "block_s": -1}')
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        'error: $.enabld: unknown key. Did you mean "enabled"?',
        "error: $.block_s: -1 is not allowed; allowed: a number from 0 to 86400.",
    ]


def test_check_config_speaks_json() -> None:
    bad = run("check-config", "--json", '{"enabld": true}')
    error = {"path": "$.enabld", "problem": "unknown key.", "hint": 'Did you mean "enabled"?'}
    assert (bad.returncode, json.loads(bad.stdout)) == (2, {"config": None, "errors": [error]})
    good = json.loads(run("check-config", "{}", "--json").stdout)
    assert (good["config"]["enabled"], good["errors"]) == (True, [])


def test_check_config_says_which_file_it_cannot_read(tmp_path: Path) -> None:
    done = run("check-config", str(tmp_path / "none.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: $: the configuration file")
    assert len(done.stderr.splitlines()) == 1


def test_an_error_is_one_line_and_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls", str(tmp_path / "none")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m tlcore check-config '{{}}' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")

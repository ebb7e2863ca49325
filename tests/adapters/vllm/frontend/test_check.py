"""What the front end makes of a configuration, before any model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tlcore
from tests.adapters.vllm.helpers import run
from tests.models import smollm2
from tlcore.adapters.vllm.frontend.check import ranks_of
from tlcore.errors import BackendError, ConfigError

pytestmark = pytest.mark.slow
KEY = "intermediate_log_config"


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def _engine_args(**keys: Any) -> Any:
    from vllm import EngineArgs

    return EngineArgs(model=str(smollm2()), **{"enforce_eager": True, **keys})


def _parsed(*flags: str) -> Any:
    from vllm import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="serve"))
    return EngineArgs.from_cli_args(parser.parse_args(["--model", str(smollm2()), *flags]))


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    return {"output_dir": str(tmp_path / "dumps"), "module_call_match": "mlp"}


def test_a_server_injects_only_with_its_operators_leave(tmp_path: Path, config: dict[str, Any]) -> None:
    from vllm.usage.usage_lib import UsageContext

    with tlcore.capture(torch.nn.Linear(2, 2), output_dir=str(tmp_path)) as capture:
        pass
    injecting = {**config, "inject": {"run": "missing", "modules": ["mlp"]}}
    with pytest.raises(ConfigError, match=r"\$\.inject\.run: "):
        _engine_args(intermediate_log_config=injecting)
    injecting["inject"]["run"] = capture.url
    arguments = _engine_args(intermediate_log_config=injecting)
    with pytest.raises(ConfigError, match=r"\$\.inject: the answers"):
        arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    assert arguments.create_engine_config(UsageContext.LLM_CLASS)
    injecting["inject"]["serve"] = True
    arguments = _engine_args(intermediate_log_config=injecting)
    assert arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)


def test_nothing_is_injected_where_caches_leave_the_engine(tmp_path: Path, config: dict[str, Any]) -> None:
    from vllm.config import KVTransferConfig

    from tlcore.adapters.vllm.frontend.attach import prepare

    with tlcore.capture(torch.nn.Linear(2, 2), output_dir=str(tmp_path)) as capture:
        pass
    injecting = {**config, "inject": {"run": capture.url, "modules": ["mlp"]}}
    away = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(ConfigError, match=r"\$\.inject: the engine's KV connector"):
        _engine_args(intermediate_log_config=injecting, kv_transfer_config=away).create_engine_config()
    running = _engine_args(kv_transfer_config=away).create_engine_config()
    with pytest.raises(ConfigError, match=r"\$\.inject: the engine's KV connector"):
        prepare(injecting, running)
    assert prepare(config, running)["config"]["inject"] is None


def test_every_way_in_gives_the_same_configuration(tmp_path: Path, config: dict[str, Any]) -> None:
    text = json.dumps(config)
    file = tmp_path / "config.json"
    file.write_text(text)
    additional = json.dumps({KEY: config})
    ways = [
        _engine_args(intermediate_log_config=config),
        _engine_args(intermediate_log_config=text),
        _engine_args(intermediate_log_config_path=str(file)),
        _engine_args(additional_config={KEY: config}),
        _parsed("--enforce-eager", "--intermediate-log-config", text),
        _parsed("--enforce-eager", "--intermediate_log_config", text),
        _parsed("--enforce-eager", "--intermediate-log-config-path", str(file)),
        _parsed("--enforce-eager", "--additional-config", additional),
        _parsed(
            "--enforce-eager",
            "--intermediate-log-config.output_dir",
            config["output_dir"],
            "--intermediate-log-config.module_call_match",
            "mlp",
        ),
    ]
    carriers = [way.additional_config[KEY] for way in ways]
    assert all(carrier["config"] == carriers[0]["config"] for carrier in carriers)
    assert carriers[0]["config"]["module_call_match"] == ["mlp"]
    assert len({carrier["run_id"] for carrier in carriers}) == len(ways)
    assert list((tmp_path / "dumps").iterdir()) == []


def test_the_run_id_survives_rebuilt_arguments(config: dict[str, Any]) -> None:
    first = _engine_args(intermediate_log_config=config)
    again = type(first)(**vars(first))
    assert again.additional_config == first.additional_config
    vllm_config = again.create_engine_config()
    carrier = vllm_config.additional_config[KEY]
    assert carrier["run_id"] == first.additional_config[KEY]["run_id"]
    assert carrier["world_size"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputdir": "/tmp"}, r'\$\.outputdir: unknown key. Did you mean "output_dir"'),
        ({"log_step_ids": "first"}, r"\$\.log_step_ids"),
        ({"module_call_match": "("}, r"\$\.module_call_match: '\(' is not a regular expression"),
        ({"backend": "ptt"}, r'\$\.backend: there is no backend \'ptt\'. Did you mean "pt"'),
    ],
)
def test_a_bad_configuration_stops_the_front_end(
    config: dict[str, Any], change: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = {**config, **change}
    with pytest.raises(ConfigError, match=message):
        _engine_args(intermediate_log_config=bad)
    with pytest.raises(ConfigError, match=message):
        _engine_args(additional_config={KEY: bad})
    with pytest.raises(SystemExit):
        _parsed("--enforce-eager", "--intermediate-log-config", json.dumps(bad))
    shown = capsys.readouterr().err
    assert "argument --intermediate-log-config: $." in shown and "Traceback" not in shown


def test_an_unwritable_place_stops_the_front_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BackendError, match=r"spill_dir.*cannot be written.*Not a directory"):
        _engine_args(
            intermediate_log_config={"output_dir": str(tmp_path), "spill_dir": str(tmp_path / "file/x")}
        )
    with pytest.raises(BackendError, match=r"output_dir.*cannot be written.*Not a directory"):
        _engine_args(intermediate_log_config={"output_dir": str(tmp_path / "file" / "dumps")})


def test_two_configurations_are_one_too_many(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="both"):
        _engine_args(intermediate_log_config=config, intermediate_log_config_path="x.json")
    with pytest.raises(ConfigError, match="both"):
        _engine_args(intermediate_log_config=config, additional_config={KEY: config})


def test_a_compiled_engine_is_accepted_unless_no_step_can_be_eager(config: dict[str, Any]) -> None:
    accepted = _engine_args(intermediate_log_config=config, enforce_eager=False).create_engine_config()
    assert accepted.compilation_config.mode.name != "NONE"
    assert accepted.additional_config[KEY]["config"]["compiled"] == "eager-steps"
    stock = _engine_args(intermediate_log_config=config, enforce_eager=False, compilation_config={"mode": 1})
    with pytest.raises(ConfigError, match="pass --enforce-eager"):
        stock.create_engine_config()


def test_commands_on_several_nodes_begin_no_run_each(config: dict[str, Any]) -> None:
    nodes = {"data_parallel_size": 2, "data_parallel_size_local": 1}
    with pytest.raises(ConfigError, match="several nodes"):
        _engine_args(intermediate_log_config=config, **nodes).create_engine_config()
    assert _engine_args(**nodes).create_engine_config()
    together = _engine_args(intermediate_log_config=config, data_parallel_size=2).create_engine_config()
    assert together.additional_config[KEY]["world_size"] == 2


def test_a_run_is_of_the_engines_that_its_front_end_has() -> None:
    together = _engine_args(data_parallel_size=4, data_parallel_size_local=2).create_engine_config()
    assert ranks_of(together) == {"world_size": 4, "first_rank": 0}
    second = {"data_parallel_size": 4, "data_parallel_size_local": 2, "data_parallel_start_rank": 2}
    balanced = _engine_args(**second, tensor_parallel_size=3).create_engine_config()
    assert ranks_of(balanced) == {"world_size": 6, "first_rank": 6}
    own = SimpleNamespace(
        world_size=2, data_parallel_size=4, data_parallel_rank_local=0, data_parallel_index=3
    )
    assert ranks_of(SimpleNamespace(parallel_config=own)) == {"world_size": 2, "first_rank": 6}


def test_volatile_keys_do_not_change_the_hash_of_what_is_compiled(config: dict[str, Any]) -> None:
    def hashed(**keys: Any) -> str:
        vllm_config = _engine_args(enforce_eager=False, **keys).create_engine_config()
        return str(vllm_config.compute_hash())

    plain = hashed()
    assert hashed(intermediate_log_config=config) == plain
    assert hashed(intermediate_log_config={**config, "log_step_ids": [7], "queue_bytes": 1}) == plain
    tapped = _engine_args(enforce_eager=False, intermediate_log_config=config).create_engine_config()
    hashes = set()
    for table in (["mlp/inputs/0"], ["mlp/inputs/0", "mlp/outputs/0"]):
        tapped.additional_config[KEY]["taps"] = table
        hashes.add(tapped.compute_hash())
    assert len(hashes | {plain}) == 3
    # What other plugins keep there still counts.
    assert (
        hashed(additional_config={KEY: config, "other": 1}) == hashed(additional_config={"other": 1}) != plain
    )


def test_disabled_leaves_no_trace(tmp_path: Path) -> None:
    off = {"enabled": False, "output_dir": str(tmp_path / "dumps")}
    assert _engine_args(intermediate_log_config=off, enforce_eager=False).additional_config == {}
    assert _engine_args().additional_config == {}
    assert not (tmp_path / "dumps").exists()


def test_workers_without_the_plugin_are_refused(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(ConfigError, match="Add tlcore to VLLM_PLUGINS"):
        _engine_args(intermediate_log_config=config)


def test_the_printed_form_hides_secrets(config: dict[str, Any]) -> None:
    from tlcore.adapters.vllm.carrier import GivenConfig

    secret = {**config, "output_dir": "memory://user:password@host/x", "backend": "tests.sinks:MemorySink"}
    engine_args = _engine_args(intermediate_log_config=secret)
    carrier = engine_args.additional_config[KEY]
    assert carrier["config"]["output_dir"] == secret["output_dir"]
    for shown in (repr(engine_args), str({"x": carrier}), repr(GivenConfig(secret))):
        assert "password" not in shown
        assert "host/x" in shown


def test_the_command_line_of_the_server_stops_without_a_traceback() -> None:
    server = ("-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2()))
    done = run(*server, "--intermediate-log-config", '{"compiled": "never"}')
    assert done.returncode == 2
    assert "$.compiled" in done.stderr and "Traceback" not in done.stderr

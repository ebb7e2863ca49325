"""vLLM prints its arguments when it starts: the configuration's credentials are not among them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SECRET, USER, NESTED = "canary-in-an-option", "canary-in-userinfo", "canary-nested"
CONFIG = {
    "backend": {
        "name": "fsspec",
        "url": f"s3://user:{USER}@bucket/runs",
        "storage_options": {"secret": SECRET, "client_kwargs": {"token": [NESTED]}},
    },
    "module_call_match": "mlp",
}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What vLLM's loggers say; they do not pass it on to the root by themselves."""
    from vllm.entrypoints.serve.utils import api_utils

    logger = logging.getLogger(api_utils.logger.name)
    logger.addHandler(caplog.handler)
    before, logger.level = logger.level, logging.DEBUG
    yield caplog
    logger.level = before
    logger.removeHandler(caplog.handler)


def parsed(*flags: str) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m", "--enforce-eager", *flags])


@pytest.mark.parametrize("way", ["flag", "additional", "dotted"])
def test_the_start_up_log_shows_no_credentials(way: str, said: pytest.LogCaptureFixture) -> None:
    from vllm.entrypoints.serve.utils.api_utils import log_non_default_args

    flags = {
        "flag": ["--intermediate-log-config", json.dumps(CONFIG)],
        "additional": ["--additional-config", json.dumps({"intermediate_log_config": CONFIG})],
        "dotted": ["--additional-config.intermediate_log_config", json.dumps(CONFIG)],
    }[way]
    args = parsed(*flags)
    log_non_default_args(args)
    shown = said.text + repr(args) + str(vars(args))
    assert "non-default args" in said.text and "mlp" in said.text
    for secret in (SECRET, USER, NESTED):
        assert secret not in shown


@pytest.mark.parametrize(
    "wrong", [{"shard_bytes": "x"}, {"storage_optoins": {"a": SECRET}}, {"storage_options": SECRET}]
)
def test_a_mistake_is_answered_without_credentials(
    wrong: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = {**CONFIG, "backend": {**CONFIG["backend"], **wrong}}  # type: ignore[dict-item]
    with pytest.raises(SystemExit):
        parsed("--intermediate-log-config", json.dumps(config))
    error = capsys.readouterr().err
    assert "$.backend" in error
    assert not any(secret in error for secret in (SECRET, USER, NESTED))

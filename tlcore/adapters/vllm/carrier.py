"""How the configuration travels from vLLM's front end to its workers, without showing its secrets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

KEY = "intermediate_log_config"
# In a carrier: the configuration is that of a client, not of the operator.
OVER_HTTP = "over_http"


class GivenConfig(dict[str, Any]):
    """A configuration as the user gave it, which vLLM's logs show with its secrets replaced."""

    def __repr__(self) -> str:
        return repr(_redacted(self))

    __str__ = __repr__


class Carrier(dict[str, Any]):
    """What lies in ``VllmConfig.additional_config``: ``config``, ``run_id``, ``world_size``, ``first_rank``.

    A plain dictionary to everyone who pickles or hashes it; only its printed form is redacted.
    """

    def __repr__(self) -> str:
        return repr({**self, "config": _redacted(self["config"])})

    __str__ = __repr__


def is_carrier(value: Any) -> bool:
    """Whether ``value`` is a carrier (also after a copy into a plain dictionary)."""
    return isinstance(value, Mapping) and "run_id" in value and "config" in value


def carried(additional_config: Any) -> Any:
    """The carrier or bare configuration in a ``VllmConfig.additional_config``; None without one."""
    return additional_config.get(KEY) if isinstance(additional_config, Mapping) else None


def _redacted(given: Mapping[str, Any]) -> dict[str, Any]:
    from ...config.configuration import load_config
    from ...errors import TlcoreError

    try:
        shown = load_config(given).to_json(redact=True)
    except TlcoreError:
        return dict.fromkeys(given, "***")
    return {key: value for key, value in shown.items() if key in given}

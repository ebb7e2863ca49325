"""The front-end process: checks a configuration before any model is loaded, and starts the run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import Any

from ....config.configuration import Config, load_config
from ....engine.filters.tensors import known_devices
from ....engine.new_run import new_run_id
from ....errors import BackendError, CaptureError, ConfigError, ReadError
from ....locations import absolute_location, is_url
from ....reader import open_run
from ....registry import open_store, resolve
from ....storage import SupportsPrepare
from ..carrier import KEY, Carrier, carried, is_carrier
from ..plugins import ENDPOINT, PLUGIN
from .probe import probe
from .shutdown import give_workers_time

_GROUP = "vllm.general_plugins"


def check(given: Config | Mapping[str, Any] | str) -> Config:
    """The configuration, valid and usable here: its backend loads in workers, its place can be written.

    Raises ConfigError or BackendError. A disabled one is only validated.
    """
    config = load_config(given)
    if config.enabled:
        if config.log_gradients:
            raise ConfigError("$.log_gradients", "vLLM computes no gradients.", "Leave the key out.")
        if config.inject is not None and not is_url(config.inject.run):
            _check_injected(config.inject.run)
        located = resolve(config.backend, portable=True).located(config.backend_options, config.output_dir)
        if not is_url(located.url):
            _probe_directory(absolute_location(located.url), "output_dir")
        if config.spill_dir is not None:
            _probe_directory(absolute_location(config.spill_dir), "spill_dir")
        _check_workers_load_plugin()
        known_devices(config.device_names)
    return config


def prepare(additional_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """``additional_config`` with its configuration checked and given a run id, or taken out if disabled.

    A carrier made earlier stays as it is. Raises ConfigError or BackendError.
    """
    prepared = dict(additional_config or {})
    given = prepared.get(KEY)
    if given is None or is_carrier(given):
        return prepared
    config = check(given)
    if not config.enabled:
        del prepared[KEY]
        return prepared
    document = config.to_json(redact=False)
    # Workers may have another working directory.
    document["output_dir"] = absolute_location(config.output_dir)
    if config.spill_dir is not None:
        document["spill_dir"] = absolute_location(config.spill_dir)
    if config.inject is not None:
        document["inject"]["run"] = absolute_location(config.inject.run)
    carrier = Carrier(config=document, run_id=new_run_id())
    if is_url(config.output_dir):
        probe(carrier)
    prepared[KEY] = carrier
    return prepared


def check_engine_config(vllm_config: Any) -> None:
    """Stop an engine that cannot be captured, and complete the carrier.

    Raises ConfigError, or CaptureError naming the vLLM version when its configuration is unknown.
    """
    carrier = carried(vllm_config.additional_config)
    if carrier is None:
        return
    check_engine(vllm_config)
    _check_nodes(vllm_config.parallel_config)
    if is_carrier(carrier):
        check_caches(carrier["config"], vllm_config)
    carrier.update(ranks_of(vllm_config))
    give_workers_time()


def check_engine(vllm_config: Any) -> None:
    """Stop a capture of an engine in which no single step can run eagerly, or with microbatches.

    Raises as `check_engine_config` does.
    """
    compilation = vllm_config.compilation_config
    for name in ("mode", "cudagraph_mode"):
        if not hasattr(compilation, name):
            raise unknown_vllm(f"its compilation config has no {name!r}")
    if mode_name(compilation.mode) == "STOCK_TORCH_COMPILE":
        problem = "with compilation mode 1 (STOCK_TORCH_COMPILE) no single step can run eagerly."
        raise ConfigError("$", problem, "Leave the mode to vLLM, or pass --enforce-eager.")
    if getattr(vllm_config.parallel_config, "use_ubatching", False):
        raise ConfigError("$", "intermediate logging does not work with microbatches (--enable-dbo).")


def _check_nodes(parallel: Any) -> None:
    """Refuse to begin a run with engines that several commands start: each would begin one of its own."""
    several = (
        int(parallel.data_parallel_size) > 1 and getattr(parallel, "data_parallel_backend", "mp") == "mp"
    )
    local = int(getattr(parallel, "data_parallel_size_local", 0) or parallel.data_parallel_size)
    if int(getattr(parallel, "nnodes", 1)) > 1 or (several and local < int(parallel.data_parallel_size)):
        problem = "vLLM's commands on several nodes would each begin a run of their own."
        raise ConfigError(
            "$", problem, "Start the capture once they run, over HTTP or with tlcore.vllm.attach."
        )


def check_caches(config: Mapping[str, Any], vllm_config: Any) -> None:
    """Refuse to inject where caches leave the engine: not every connector heeds a request's cache salt."""
    if config.get("inject") is not None and getattr(vllm_config, "kv_transfer_config", None) is not None:
        problem = (
            "the engine's KV connector (kv_transfer_config) may hand what comes of it to other requests."
        )
        raise ConfigError("$.inject", problem, "Inject into an engine without one.")


def compiles(vllm_config: Any) -> bool:
    """Whether the engine compiles its model or uses CUDA graphs."""
    compilation = vllm_config.compilation_config
    return mode_name(compilation.mode) != "NONE" or mode_name(compilation.cudagraph_mode) != "NONE"


def serves_endpoint() -> bool:
    """Whether ``VLLM_PLUGINS`` names the plugin by which a server's capture is started later."""
    return ENDPOINT in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]


def ranks_of(vllm_config: Any) -> dict[str, int]:
    """What a carrier says of the ranks that write into its run: ``world_size`` and ``first_rank``.

    The latter is the first one's number among all of the deployment: with an external or a hybrid load
    balancer, and offline with a program for each engine, others have front ends, and runs, of their own.
    """
    parallel = vllm_config.parallel_config
    engines = int(parallel.data_parallel_size)
    if getattr(parallel, "data_parallel_rank_local", None) is not None:
        engines = 1
    elif getattr(parallel, "local_engines_only", False):
        engines = int(parallel.data_parallel_size_local)
    first = int(getattr(parallel, "data_parallel_index", 0))
    inside = int(parallel.world_size)
    return {"world_size": inside * engines, "first_rank": inside * first}


def unknown_vllm(problem: str) -> CaptureError:
    """The error for a vLLM whose internals are not the ones that this adapter knows."""
    import vllm

    version = getattr(vllm, "__version__", "(unknown)")
    return CaptureError(
        f"this version of tlcore does not know vLLM {version}: {problem}. Nothing can be captured; "
        "take out --intermediate-log-config, or use a vLLM release that tlcore supports."
    )


def mode_name(mode: Any) -> str:
    """The name of a compilation or CUDA graph mode, whether vLLM holds it as an enum or as text."""
    return str(getattr(mode, "name", mode))


def check_served(additional_config: Mapping[str, Any], usage: Any) -> None:
    """Refuse a server that would answer from injected results without its operator's leave.

    ``usage`` is what vLLM calls the engine's usage context. Raises ConfigError.
    """
    carrier = carried(additional_config)
    inject = carrier["config"].get("inject") if is_carrier(carrier) else None
    if str(getattr(usage, "name", usage)) == "OPENAI_API_SERVER" and inject and not inject.get("serve"):
        problem = "the answers of a server would come of another run's results."
        raise ConfigError("$.inject", problem, 'Add "serve": true to it if that is what you want.')


def _check_injected(run: str) -> None:
    try:
        open_run(run)
    except ReadError as error:
        raise ConfigError("$.inject.run", f"{error}.", "Give the path or URL of a run.") from None


def _probe_directory(path: str, key: str) -> None:
    store = open_store(os.path.join(path, "run"))
    try:
        if isinstance(store, SupportsPrepare):
            store.prepare_parent()
        os.rmdir(tempfile.mkdtemp(prefix=".tlcore-probe-", dir=path))
    except BackendError as error:
        raise BackendError(f"$.{key}: {error}") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise BackendError(
            f"$.{key}: {path!r} cannot be written: {reason}. "
            "Give a directory in which this user may create directories."
        ) from None


def _check_workers_load_plugin() -> None:
    """Workers learn about capture from the plugin alone: without it they would silently store nothing."""
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in [name.strip() for name in allowed.split(",")]:
        problem = f"VLLM_PLUGINS={allowed!r} keeps vLLM's workers from loading the plugin {PLUGIN!r}."
        raise ConfigError("$", problem, f"Add {PLUGIN} to VLLM_PLUGINS, or unset it.")
    if not any(point.name == PLUGIN for point in entry_points(group=_GROUP)):
        problem = "tlcore can be imported but is not installed, so vLLM's workers do not load it."
        raise ConfigError("$", problem, "Install it into this environment with pip.")

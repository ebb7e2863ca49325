"""The vLLM adapter: plugs the intermediate-logging flag and its capture into a stock vLLM.

Importing this module imports neither torch nor vLLM. vLLM calls `register` (entry point
``vllm.general_plugins``) in every process and `platform` (``vllm.platform_plugins``) earlier still.
Both only wait for the vLLM modules that are patched; nothing else happens until a configuration
asks for capture.
"""

from __future__ import annotations

from types import ModuleType

from ..patching import when_imported

# A server's requests, of the versions that have them in one place or in several.
_BODIES = (
    "vllm.entrypoints.openai.protocol",
    "vllm.entrypoints.openai.completion.protocol",
    "vllm.entrypoints.openai.chat_completion.protocol",
    "vllm.entrypoints.openai.responses.protocol",
    "vllm.entrypoints.speech_to_text.transcription.protocol",
    "vllm.entrypoints.speech_to_text.translation.protocol",
)


def register() -> None:
    """Make vLLM accept the configuration and its workers follow it. Safe to repeat."""
    when_imported("vllm.engine.arg_utils", _patch_arguments)
    when_imported("vllm.v1.worker.worker_base", _patch_workers)
    when_imported("vllm.config.vllm", _patch_hash)
    when_imported("vllm.v1.metrics.prometheus", _patch_registry)
    when_imported("vllm.v1.executor.multiproc_executor", _patch_executor)
    when_imported("vllm.v1.engine.utils", _patch_engines)
    when_imported("vllm.v1.engine.core", _patch_core)
    when_imported("vllm.v1.core.sched.output", _patch_requests)
    when_imported("vllm.sampling_params", _patch_sampling)
    when_imported("vllm.v1.engine.input_processor", _patch_input)
    for name in _BODIES:
        when_imported(name, _patch_bodies)


def platform() -> None:
    """Register early, while vLLM looks for its platform; None says that this is not a platform."""
    register()


install_import_hook = register


def _patch_arguments(module: ModuleType) -> None:
    from .frontend.arguments import patch_arguments

    patch_arguments(module)


def _patch_hash(module: ModuleType) -> None:
    from .compiled.eager_steps import patch_hash

    patch_hash(module)


def _patch_registry(module: ModuleType) -> None:
    from .metrics import patch_registry

    patch_registry(module)


def _patch_executor(module: ModuleType) -> None:
    from .frontend.deaths import patch_executor

    patch_executor(module)


def _patch_engines(module: ModuleType) -> None:
    from .frontend.deaths import patch_engines

    patch_engines(module)


def _patch_core(module: ModuleType) -> None:
    from .frontend.signals import patch_core

    patch_core(module)


def _patch_requests(module: ModuleType) -> None:
    from .worker.identity import patch_requests

    patch_requests(module)


def _patch_sampling(module: ModuleType) -> None:
    from .frontend.requests import patch_sampling

    patch_sampling(module)


def _patch_input(module: ModuleType) -> None:
    from .frontend.requests import patch_input

    patch_input(module)


def _patch_bodies(module: ModuleType) -> None:
    from .frontend.requests import patch_bodies

    patch_bodies(module)


def _patch_workers(module: ModuleType) -> None:
    from .worker.install import patch_workers

    patch_workers(module)

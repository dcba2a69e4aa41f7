"""
Neural Block Linearization for llm-compressor, served by vLLM.

vLLM imports this file in every worker: standard library only, the rest on first use.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llmcompressor_plugin.distill import Distill
    from .llmcompressor_plugin.modifier import NBLModifier

    __version__: str

__all__ = ["Distill", "NBLModifier", "__version__", "register"]

_MODULES = {
    "Distill": ".llmcompressor_plugin.distill",
    "NBLModifier": ".llmcompressor_plugin.modifier",
}
_COMPRESS_PACKAGES = {"compressed_tensors", "llmcompressor", "loguru", "pydantic"}


def __getattr__(name: str) -> Any:
    """
    Import the public ``name`` on first use (PEP 562).

    :raises AttributeError: if ``name`` is not public
    :raises ImportError: if it needs llm-compressor and that is not installed
    """
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("nbl-modifier")
    elif name in _MODULES:
        try:
            value = getattr(import_module(_MODULES[name], __name__), name)
        except ModuleNotFoundError as err:
            missing = (err.name or "").partition(".")[0]
            if missing not in _COMPRESS_PACKAGES:
                raise
            raise ImportError(
                f"{__name__}.{name} needs {missing}, which is not installed. "
                f'Run: pip install "nbl-modifier[compress]"'
            ) from err
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def register() -> None:
    """
    Make transformers load linearized checkpoints, and recipes know ``NBLModifier``.

    The latter where llm-compressor is installed. vLLM needs no call: it finds its
    plugin by itself. Safe to call again.
    """
    import_module(".hf", __name__).register()
    if find_spec("llmcompressor") is not None:
        import_module(_MODULES["NBLModifier"], __name__)


def __dir__() -> list[str]:
    """Return the module's names, including those not imported yet."""
    return sorted({*globals(), *__all__})

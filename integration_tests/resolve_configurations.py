"""
What vLLM makes of configurations: a process of its own, in the serve environment.

    python resolve_configurations.py FOLDER...

Prints a JSON object by folder: every field of vLLM's configuration, and what it makes
of the model's, as text.
"""

import dataclasses
import functools
import inspect
import json
import sys
from typing import Any


def resolved(folder: str) -> dict[str, str]:
    """Return vLLM's configuration for the model in ``folder``, flat, as text."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=folder, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True
    )
    config: Any = arguments.create_engine_config()
    fields: dict[str, str] = {}
    for part in dataclasses.fields(config):
        value = getattr(config, part.name)
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                found = getattr(value, field.name, None)
                fields[f"{part.name}.{field.name}"] = repr(found)
    model = config.model_config
    fields["hf_config.model_type"] = model.hf_config.model_type
    for name, _ in inspect.getmembers(type(model), _is_computed):
        fields[f"model_config.{name}"] = repr(getattr(model, name, None))
    return fields


def _is_computed(member: Any) -> bool:
    return isinstance(member, (property, functools.cached_property))


def main() -> None:
    """Print what was found."""
    from vllm.model_executor.models import registry

    # It looks at each model's class in one more process, which would import all again.
    registry._run_in_subprocess = lambda look: look()
    found = {folder: resolved(folder) for folder in sys.argv[1:]}
    print("RESOLVED " + json.dumps(found))


if __name__ == "__main__":
    main()

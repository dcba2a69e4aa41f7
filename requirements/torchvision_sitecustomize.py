# ruff: noqa: INP001  # copied to where it is used
"""
Lets torchvision's Python part work where its compiled part does not load.

PyPI's torchvision for Linux is compiled for CUDA and does not load beside the CPU build
of torch, and importing it then fails for want of the names of two operators, which are
about boxes in images and which no model here uses. `make env-serve` puts torchvision
into a folder of its own, and this file beside it, so that only who asks for that folder
gets them (``PYTHONPATH``). Beside a torchvision that loads it does nothing.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Finder(importlib.abc.MetaPathFinder):
    """Names the operators once torchvision has looked for its compiled part."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,  # noqa: ARG002  # as it is called
    ) -> importlib.machinery.ModuleSpec | None:
        """Return where ``torchvision.extension`` is; nothing else's."""
        if fullname != "torchvision.extension":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_name(module: ModuleType) -> None:
            execute(module)
            if not module._has_ops():
                from torch.library import define

                for operator in ("nms", "qnms"):
                    define(f"torchvision::{operator}", _BOXES)

        spec.loader.exec_module = execute_and_name  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _Finder())

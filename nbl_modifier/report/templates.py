# SPDX-License-Identifier: Apache-2.0
"""The files in ``templates/``, filled in by Jinja."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from .escaping import escape_markdown, fenced, html_paragraph, markdown_paragraph

__all__ = ["render"]


def render(name: str, /, **values: Any) -> str:
    """
    Return a template's text with ``values`` in it, escaped where it is HTML.

    :param name: of a file in ``templates/``
    :param values: what the template names
    :raises jinja2.UndefinedError: if it names one that is not given
    """
    return _environment().get_template(name).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    for function in (escape_markdown, fenced, html_paragraph, markdown_paragraph):
        environment.filters[function.__name__] = function
    environment.filters["slug"] = _slug
    environment.tests["a"] = _is_a
    return environment


def _slug(title: str) -> str:
    """Return a title as an anchor."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _is_a(item: Any, kind: str) -> bool:
    """Return whether an item is of the class with that name."""
    return type(item).__name__ == kind

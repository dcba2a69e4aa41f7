# SPDX-License-Identifier: Apache-2.0
"""
llm-compressor finds no modifier of an installed package.

It searches its own package only (llmcompressor 0.14.0.1, modifiers/factory.py,
``ModifierFactory.refresh``), so a recipe file that names another one fails until some
code has imported it.
"""

import sys

from llmcompressor.recipe import Recipe

RECIPE = "default_stage: {default_modifiers: {NBLModifier: {num_layers: 1}}}"


def finds_it() -> bool:
    """Return whether the recipe can be read."""
    try:
        modifiers = Recipe.create_instance(RECIPE).modifiers
    except ValueError as err:
        print(f"  ValueError: {err}")
        return False
    print(f"  {[type(modifier).__name__ for modifier in modifiers]}")
    return True


def main() -> int:
    """Return 0 if it is as described."""
    print("recipe before `from nbl_modifier import NBLModifier`:")
    before = finds_it()
    from nbl_modifier import NBLModifier  # noqa: F401  # registers itself

    print("and after:")
    after = finds_it()
    return int(before or not after)


if __name__ == "__main__":
    sys.exit(main())

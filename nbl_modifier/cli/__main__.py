# SPDX-License-Identifier: Apache-2.0
"""``python -m nbl_modifier.cli``, where the ``nbl`` script is not on the path."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())

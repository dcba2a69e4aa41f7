"""Settings that every test relies on, also when pytest runs without make."""

import os

from hypothesis import settings

# Before transformers is imported: tests use the bundled model, never the hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No deadline: the first example pays for imports and thread pools. Derandomized: a
# failure in CI is the same failure on a desk.
settings.register_profile("nbl", deadline=None, derandomize=True)
settings.load_profile("nbl")

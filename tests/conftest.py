from __future__ import annotations

import os

# Networks of the tests are too small for several threads, and workers of pytest-xdist share the processors.
os.environ.setdefault("OMP_NUM_THREADS", "1")

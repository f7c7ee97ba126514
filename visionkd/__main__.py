"""``python -m visionkd`` is the ``visionkd`` command."""

from __future__ import annotations

import sys

from visionkd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

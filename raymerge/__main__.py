"""``python -m raymerge`` is ``raymerge``."""

import sys

from raymerge.cli import main

sys.exit(main())

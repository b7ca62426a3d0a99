"""Run the command line as ``python -m raymerge``."""

import sys

from raymerge.cli import main

sys.exit(main())

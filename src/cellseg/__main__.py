"""`python -m cellseg` is the command `cellseg`."""

import sys

from cellseg.cli import main

sys.exit(main())

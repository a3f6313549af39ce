"""`python -m mxref.verification.cli`: the `mxref` command."""

import sys

from mxref.verification.cli import main

sys.exit(main())

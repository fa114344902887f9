"""``python -m vlscale.doctor``: the same as ``vlscale doctor``; the way that deepspeed's ``--module`` starts it."""

import sys

from vlscale.cli import main

raise SystemExit(main(["doctor", *sys.argv[1:]]))

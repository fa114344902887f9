"""``python -m vlscale``: the same as the console script."""

from vlscale.cli import main

raise SystemExit(main())

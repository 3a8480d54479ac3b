"""``python -m edgepress``."""

from edgepress.cli import main

raise SystemExit(main())

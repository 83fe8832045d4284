"""`python -m stagepatch`"""

from stagepatch.cli import main

raise SystemExit(main())

"""``python -m normfree``."""

import sys

from normfree.cli import main

sys.exit(main())

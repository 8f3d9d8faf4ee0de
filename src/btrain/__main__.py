"""`python -m btrain` is the command `btrain`."""

import sys

from btrain.cli import main

sys.exit(main())

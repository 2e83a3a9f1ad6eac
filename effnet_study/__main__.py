"""`python -m effnet_study` is the `effnet` command."""

import sys

from effnet_study.cli import main

sys.exit(main())

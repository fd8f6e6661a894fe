"""`python -m tinyfusion_core`, also for `accelerate launch -m` and `torchrun -m`."""

import sys

from .cli import main

sys.exit(main())

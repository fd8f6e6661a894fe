"""`python -m tinyfusion_core`, also for `accelerate launch -m` and `torchrun -m`."""

import sys

from .cli import main

code = main()
if "torch.distributed" in sys.modules:  # else there are no other processes, and importing it would take a second
    from .runtime.distributed import shutdown

    shutdown()
sys.exit(code)

"""`python -m wfnet` is the command line, also below `torchrun -m`."""

from wfnet.cli import main

raise SystemExit(main())

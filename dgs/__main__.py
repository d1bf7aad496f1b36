"""Run the command line: ``python -m dgs`` does what ``dgs`` does."""

import sys

from dgs.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

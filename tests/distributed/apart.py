"""`softpref` with another β in every process, as when machines are started by hand."""

import os
import sys

from softpref.cli import main

if __name__ == "__main__":
    main([*sys.argv[1:], "--beta", str(0.1 + int(os.environ["RANK"]))])

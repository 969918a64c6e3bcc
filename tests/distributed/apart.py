"""`softpref` told something else in every process, as when machines are started by hand.

`{rank}` in an argument is the process's number.
"""

import os
import sys

from softpref.cli import main

if __name__ == "__main__":
    main([argument.replace("{rank}", os.environ["RANK"]) for argument in sys.argv[1:]])

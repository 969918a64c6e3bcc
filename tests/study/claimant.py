"""One of so many processes that work on one study: `claimant.py OUTPUT SECONDS_A_RUN HOW_MANY`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from softpref.study import study
from softpref.study.choices import StudyOptions
from tests.study.test_study import Pretended


def main() -> None:
    output, seconds, together = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    preset = Pretended(str(output / "log"), seconds=seconds, together=together)
    validated = study.validated
    study.validated = lambda name, options: (validated(name, options)[0], preset, output)
    options = StudyOptions(
        methods=["dpo", "mspo"], noise=[0.4], seeds=[0, 1, 2, 3], jobs=1, output=str(output)
    )
    study.run_study("table1", options)


if __name__ == "__main__":
    main()

"""leflux_server.py on a machine whose clock is wrong and whose disk is slow.

    python bench/bad_machine.py FAULTS [the server's arguments]

FAULTS names a file that holds two numbers, read again and again: by how many seconds the clock is
wrong, and how many a checkpoint of the database takes longer.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import leflux_server as lf

FAULTS = Path(sys.argv[1])
true_time, copy_log = time.time, lf.Store._copy_log


def faults() -> list[float]:
    return [float(one) for one in FAULTS.read_text().split()]


def wrong_time() -> float:
    return true_time() + faults()[0]


def copy_slowly(self: lf.Store) -> tuple[int, int]:
    time.sleep(faults()[1])
    return copy_log(self)


time.time = wrong_time
lf.Store._copy_log = copy_slowly  # type: ignore[method-assign]
sys.exit(lf.main(sys.argv[2:]))

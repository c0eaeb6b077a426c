"""How often Python looks for garbage in cycles, in a process that keeps many pairs in flight."""

import gc

THRESHOLDS = (100_000, 50, 100)
"""New objects that are not freed until the young are searched, and such searches until older ones are searched too."""


def calm() -> None:
    """Search seldom: pairs in flight are hundreds of thousands of living objects, and each search walks over them.

    Python's own thresholds search after 700 new objects; a fifth of the control plane's time went there with 10⁵ pairs
    in flight (`benchmarks.control_plane`).
    """
    # Not frozen as well: what is frozen is left at the end, and libraries that count their objects complain then.
    gc.set_threshold(*THRESHOLDS)

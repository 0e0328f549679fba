"""One way into attention: the seam, its sites and running sums of maps."""

from sfumato.attention.seam import AttentionSeam, Call, Forward, OtherMap, StopForward, Tap
from sfumato.attention.sites import Site, Where, find_sites

__all__ = [
    "AttentionSeam",
    "Call",
    "Forward",
    "OtherMap",
    "Site",
    "StopForward",
    "Tap",
    "Where",
    "find_sites",
]

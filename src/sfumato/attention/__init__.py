"""One way into attention: the seam, its sites and running sums of maps."""

from sfumato.attention.call import Call
from sfumato.attention.map_replacement import MapReplacement
from sfumato.attention.seam import AttentionSeam, Forward, StopForward
from sfumato.attention.sites import Site, Where, find_sites
from sfumato.attention.tap import Tap

__all__ = [
    "AttentionSeam",
    "Call",
    "Forward",
    "MapReplacement",
    "Site",
    "StopForward",
    "Tap",
    "Where",
    "find_sites",
]

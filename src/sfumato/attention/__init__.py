"""One way into attention: the seam, its sites, running sums of maps, and the words of a prompt as token spans."""

from sfumato.attention.seam import AttentionSeam, Call, Forward, StopForward, Tap
from sfumato.attention.sites import Site, Where, find_sites

__all__ = ["AttentionSeam", "Call", "Forward", "Site", "StopForward", "Tap", "Where", "find_sites"]

"""The tile of the update as a constant: nothing about a tensor's size or type asks for another.

Elementwise, so bytes in flight count: 8 elements a thread are one 16-byte access of a 16-bit stream and two of each
fp32 stream. A thread asks for 56 to 64 bytes before it needs the first, and three programs of four warps fit on a
multiprocessor of sm_90 even with masters (168 registers): some 20 KB under way, what a memory of 4.3 TB/s needs to stay
busy. A tensor's last tile is masked; all others take the unmasked path, whose accesses are wide.
"""

BLOCK = 1_024
WARPS = 4
SUM_BLOCK = 1_024  # partial sums that the norm's second kernel adds at a time

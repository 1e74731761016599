"""How the record of a slot is laid out, for those who write it and those who read it; needs no Triton."""

# The key has so many bits, and those above say for how many queries of its chunk it stays. Rows on a GPU are no longer.
KEY_BITS = 24
# Chunks of queries for which changes of slots are looked up together.
LOOKED_AHEAD = 256

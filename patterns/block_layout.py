"""A layout of blocks that comes with the call: block row ``q // block`` sees block column ``kv // block`` where marked.

``layout=`` is a boolean tensor [H, rows, columns], as in block-sparse libraries; it must cover every position.
"""

from flexsparse.language import Mask, at_least, captured, h, kv, pattern, q


@pattern(examples=[{"block": 32}])
def block_layout(block: int, layout: str = "layout") -> Mask:
    at_least(1, block=block)
    return captured(layout, dims=("h", "row", "column"), dtype="bool")[h, q // block, kv // block]

"""Neighbourhood attention on a video of ``frames`` x ``height`` x ``width``, flattened frame by frame, row by row.

Each voxel sees ``kernel`` voxels along each axis around it, shifted inward at the borders; ``kernel`` is at most each
extent. Positions past the video see nothing and are not seen. Hassani et al., arXiv 2204.07143.
"""

from flexsparse.errors import PatternArgumentError
from flexsparse.language import Mask, Value, at_least, kv, maximum, minimum, pattern, q


@pattern(examples=[{"frames": 4, "height": 6, "width": 8, "kernel": 3}])
def natten_3d(frames: int, height: int, width: int, kernel: int) -> Mask:
    at_least(1, frames=frames, height=height, width=width, kernel=kernel)
    if kernel > min(frames, height, width):
        raise PatternArgumentError("kernel", got=str(kernel), expected="at most each extent of the video")
    total = frames * height * width

    def near(mine: Value, other: Value, extent: int) -> Mask:
        start = maximum(minimum(mine - kernel // 2, extent - kernel), 0)
        return (other >= start) & (other < start + kernel)

    mask = (q < total) & (kv < total)
    mask = mask & near(q // (height * width), kv // (height * width), frames)
    mask = mask & near(q // width % height, kv // width % height, height)
    return mask & near(q % width, kv % width, width)

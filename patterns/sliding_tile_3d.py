"""A video laid out tile after tile, ``tile`` positions an axis; tiles within ``window`` of each other attend.

Position p lies in tile ``p // tile^3``; tiles are numbered frame by frame, row by row, over ``frames`` x ``height``
x ``width`` tiles. Tiles see each other fully where their distance is at most ``window`` (inclusive) along each axis, so
blocks of ``tile^3`` positions are whole. Zhang et al., Sliding Tile Attention, arXiv 2502.04507.
"""

from flexsparse.language import Mask, at_least, kv, pattern, q


@pattern(examples=[{"frames": 3, "height": 3, "width": 4, "tile": 2, "window": 1}])
def sliding_tile_3d(frames: int, height: int, width: int, tile: int, window: int) -> Mask:
    at_least(1, frames=frames, height=height, width=width, tile=tile)
    at_least(0, window=window)
    mine, other, total = q // tile**3, kv // tile**3, frames * height * width
    mask = (mine < total) & (other < total)
    mask = mask & (abs(mine // (height * width) - other // (height * width)) <= window)
    mask = mask & (abs(mine // width % height - other // width % height) <= window)
    return mask & (abs(mine % width - other % width) <= window)

"""Neighbourhood attention on an image of ``height`` x ``width``, flattened row by row.

Each pixel sees ``kernel_height`` x ``kernel_width`` pixels around it, shifted inward at the borders; kernels are at
most as large as the image. Positions past the image form further rows and see none of it. Hassani et al., arXiv
2204.07143.
"""

from flexsparse.errors import PatternArgumentError
from flexsparse.language import Mask, at_least, kv, maximum, minimum, pattern, q


@pattern(examples=[{"height": 12, "width": 16, "kernel_height": 3, "kernel_width": 5}])
def natten_2d(height: int, width: int, kernel_height: int, kernel_width: int) -> Mask:
    at_least(1, height=height, width=width, kernel_height=kernel_height, kernel_width=kernel_width)
    for name, size, most in (("kernel_height", kernel_height, height), ("kernel_width", kernel_width, width)):
        if size > most:
            raise PatternArgumentError(name, got=str(size), expected=f"at most the image's, {most}")
    top = maximum(minimum(q // width - kernel_height // 2, height - kernel_height), 0)
    left = maximum(minimum(q % width - kernel_width // 2, width - kernel_width), 0)
    row, column = kv // width, kv % width
    inside = (q < height * width) & (kv < height * width)
    return inside & (row >= top) & (row < top + kernel_height) & (column >= left) & (column < left + kernel_width)

"""What a pattern becomes below Python: Triton source, the compiler's texts down to SASS, what kernels take of a GPU."""

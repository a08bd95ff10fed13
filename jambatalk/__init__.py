"""JambaTalk: speech in, a talking 3D face out (arXiv 2408.01627), on the kernels of `jambatalk_kernels`."""

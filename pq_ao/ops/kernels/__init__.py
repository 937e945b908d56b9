"""Triton kernels, one file an op. Imported only where they run: on a GPU, or in Triton's interpreter by the tests."""

"""Triton kernels; each has an eager twin in the tests."""

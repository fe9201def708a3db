"""Tests of what is beside the package: examples, benchmarks, pages."""

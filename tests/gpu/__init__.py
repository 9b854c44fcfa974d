"""The parts of tests/bench_gpu.py, one subject a module."""

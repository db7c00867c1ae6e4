"""The sections of ``benchmarks/gpu.py``: each measures one thing and puts a row for each result."""

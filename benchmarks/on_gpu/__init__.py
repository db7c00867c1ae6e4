"""Sections of ``benchmarks/gpu.py``; each measures one quantity and writes one row per result."""

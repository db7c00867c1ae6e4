"""Benchmark of training modes: memory, speed and accuracy against full fine-tuning, on the same work."""

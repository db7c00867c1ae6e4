"""Memory, speed and accuracy of training modes against full fine-tuning, on the same work."""

"""Training: the loop, its state, and the Ray Train job around it."""

"""The queue of anchors and the losses that read it."""

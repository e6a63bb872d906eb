"""The queue of anchors, past teacher embeddings, and the losses that read it.

>>> from isd_ray.queue import DistributedQueue, losses
"""

from isd_ray.queue.distributed import DistributedQueue

__all__ = ["DistributedQueue"]

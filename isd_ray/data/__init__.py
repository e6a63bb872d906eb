"""Images: catalog, shards, index, imbalance, the plan of an epoch, the stream of batches, and views."""

"""The index table: where its shards lie and the labels it holds."""

import json

import numpy as np
import pyarrow as pa


def root(table: pa.Table) -> str:
    """Return the URI of the folder that holds the shards."""
    return json.loads(table.schema.metadata[b"isd_ray"])["root"]


def labels(table: pa.Table) -> np.ndarray:
    """Return the labels, int64 [N], with -1 where there is none."""
    return table.column("label").fill_null(-1).to_numpy().astype(np.int64)

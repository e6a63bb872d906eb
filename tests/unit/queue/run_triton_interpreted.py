"""Compare the GPU kernel with float64; run with TRITON_INTERPRET=1, which must be set before the kernel's import."""

import torch
from torch.nn.functional import normalize

from isd_ray.queue import attention
from isd_ray.queue.triton_attention import attend_splits

CASES = [  # queries, anchors, D, type of the anchors, tolerance of read
    (5, 70, 24, torch.float16, 1e-3),
    (130, 200, 128, torch.float16, 1e-3),
    (3, 100, 512, torch.float16, 1e-3),
    (40, 90, 512, torch.float32, 1e-6),
]

for rows, anchors, dim, dtype, tolerance in CASES:
    generator = torch.Generator().manual_seed(dim)
    x = normalize(torch.randn(rows, dim, generator=generator), dim=1) / 0.1
    keys = normalize(torch.randn(anchors, dim, generator=generator), dim=1).to(dtype)
    own = torch.randint(0, 9, (rows,), generator=generator)
    index = torch.randint(-1, 9, (anchors,), generator=generator)
    index[:64] = own[0]  # a whole tile in which the first query has no anchor
    for ids in ((None, None), (own, index)):
        expected = attention.attend(x.to(dtype).double(), keys.double(), *ids)
        for splits in (1, 3):
            read, lse = attention.merge(*attend_splits(x, keys, *ids, splits=splits))
            torch.testing.assert_close(read.double(), expected[0], rtol=0, atol=tolerance)
            torch.testing.assert_close(lse.double(), expected[1], rtol=0, atol=1e-5)
            print("equal")

"""How long decoders take for an image, and whether they give Pillow's pixels: why `isd_ray.data.decode` uses which.

    python -m benchmarks.decoders

Whole files in memory to uint8 arrays [h, w, 3], one thread, in turns, processor time of the best turn. The images come
from `../shared/data` or ISD_RAY_TEST_DATA. OpenCV is not among the project's packages; it is left out where missing.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from benchmarks.data import REAL_DATA, SETS
from isd_ray.data.decode import decode

Decoder = Callable[[bytes], np.ndarray]


def pillow(data: bytes) -> np.ndarray:
    """Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def torchvision(data: bytes) -> np.ndarray:
    """Torchvision's decoders (libjpeg-turbo, libwebp)."""
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_image(tensor, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()


def decoders(jpeg: bool) -> dict[str, Decoder]:
    """Return what can decode this format."""
    found: dict[str, Decoder] = {
        "ours": lambda data: decode(data).pixels,
        "Pillow": pillow,
        "torchvision": torchvision,
    }
    if jpeg:
        found["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(data, "RGB")
    try:
        import cv2

        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
    except ModuleNotFoundError as error:
        print(f"OpenCV is left out: {error}")
    return found


def measure(name: str, images: int, turns: int) -> list[dict[str, object]]:
    """Return a row for each decoder on one set."""
    table = pq.read_table(REAL_DATA / SETS[name][0], columns=["image"]).slice(0, images)
    files = table["image"].to_pylist()
    kinds = decoders(files[0][:3] == b"\xff\xd8\xff")
    best = dict.fromkeys(kinds, float("inf"))
    for _ in range(turns):
        for kind, run in kinds.items():
            start = time.process_time()
            for data in files:
                run(data)
            best[kind] = min(best[kind], time.process_time() - start)
    same = {
        kind: all(np.array_equal(run(data), pillow(data)) for data in files[:100])
        for kind, run in kinds.items()
    }
    return [
        {"set": name, "decoder": kind, "ms": 1000 * best[kind] / len(files), "same_pixels": same[kind]}
        for kind in kinds
    ]


def main() -> None:
    """Measure every set, print one table and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=400, help="images of each set")
    parser.add_argument("--turns", type=int, default=5, help="turns of every decoder")
    parser.add_argument("--json", default="results/benchmark_decoders.json", help="where the JSON goes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in SETS for row in measure(name, given.images, given.turns)]
    print("| set | decoder | ms an image | Pillow's pixels |\n|---|---|---:|---|")
    for row in rows:
        print(
            f"| {row['set']} | {row['decoder']} | {row['ms']:.3f} | {'yes' if row['same_pixels'] else 'no'} |"
        )
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()

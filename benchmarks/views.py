"""Strong views a second on the CPU: ours in batches against torchvision sample by sample, and kornia where it is there.

    python -m benchmarks.views

Every contestant makes MoCo v2's view (crop, jitter, grey, blur, mirror, normalise) of the same uint8 images, in one
process with one thread, in turns; processor time, the best turn. "pillow" is torchvision on Pillow images with
Pillow's blur, as MoCo v2 was published; "tensor" is torchvision v2 on uint8 tensors with its own blur.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.data_contestants import MEAN, STD, strong_view
from isd_ray.data.augment import make_views
from isd_ray.data.stream import Batch

Maker = Callable[[Tensor], Any]
SIZES = {32: 256, 224: 64}  # side of image and view in pixels: images a batch


def ours(size: int) -> Maker:
    """The views of the training loop."""

    def make(images: Tensor) -> Tensor:
        rows = torch.arange(len(images))
        return make_views(Batch(images[:, None], rows, rows, rows, 0, 0), ["strong"], size, MEAN, STD)[0]

    return make


def without_blur(steps: list[Any], blur: Any, size: int) -> list[Any]:
    """Leave blur out of small views, as ours does and recipes for small images do."""
    return steps if size >= 49 else [step for step in steps if step is not blur]


def pillow(size: int) -> Maker:
    """Torchvision on Pillow images, one by one."""
    steps = list(strong_view(size).transforms)
    view = v2.Compose(without_blur(steps, steps[3], size))
    return lambda images: torch.stack(
        [view(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
    )


def tensor(size: int) -> Maker:
    """Torchvision v2 on uint8 tensors, one by one."""
    steps = list(strong_view(size).transforms)
    steps[3] = v2.RandomApply([v2.GaussianBlur(13, (0.1, 2.0))], p=0.5)
    kept = [step for step in without_blur(steps, steps[3], size) if not isinstance(step, v2.PILToTensor)]
    view = v2.Compose(kept)
    return lambda images: torch.stack([view(image) for image in images])


def kornia(size: int) -> Maker:
    """Kornia's batched augmentations."""
    import kornia.augmentation as K

    blur = K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5)
    steps = [
        K.RandomResizedCrop((size, size), scale=(0.2, 1.0)),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
        blur,
        K.RandomHorizontalFlip(),
        K.Normalize(torch.tensor(MEAN), torch.tensor(STD)),
    ]
    view = torch.nn.Sequential(*without_blur(steps, blur, size))
    return lambda images: view(images.float() / 255)


MAKERS: dict[str, Callable[[int], Maker]] = {
    "ours": ours,
    "torchvision v2, pillow": pillow,
    "torchvision v2, tensor": tensor,
    "kornia": kornia,
}


def rates(size: int, turns: int) -> dict[str, float]:
    """Return views a second of processor time for each contestant that can be imported."""
    images = torch.randint(0, 256, (SIZES[size], 3, size, size), dtype=torch.uint8)
    makers, best = {}, {}
    for name, build in MAKERS.items():
        try:
            makers[name] = build(size)
        except ModuleNotFoundError as error:
            print(f"{name} is left out: {error}")
    for make in makers.values():
        make(images[:8])
    for _ in range(turns):
        for name, make in makers.items():
            start = time.process_time()
            make(images)
            rate = len(images) / (time.process_time() - start)
            best[name] = max(best.get(name, 0.0), rate)
    return best


def main() -> None:
    """Measure both sizes, print one table and write one JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5, help="turns of every contestant")
    parser.add_argument("--json", default="results/benchmark_views.json", help="where the JSON goes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for size in SIZES:
        best = rates(size, given.turns)
        rows += [
            {"pixels": size, "contestant": name, "views_per_second": rate, "ours": best["ours"] / rate}
            for name, rate in best.items()
        ]
    print("| pixels | contestant | views/s | ours, times as fast |\n|---:|---|---:|---:|")
    for row in rows:
        print(
            f"| {row['pixels']} | {row['contestant']} | {row['views_per_second']:,.0f} | {row['ours']:.2f} |"
        )
    path = Path(given.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"rows": rows, "torch": torch.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()

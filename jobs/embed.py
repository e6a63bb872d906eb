"""Embeddings of any image set to Parquet: shard, key, label, embedding. Run it again after a stop: it continues.

python jobs/embed.py --run runs/NAME --shards shards/photos/train --out embeddings/photos
python jobs/embed.py --run runs/NAME --network teacher --dataset cifar10 --root DATA --split test --out cifar10
python jobs/embed.py --weights moco.pth --backbone resnet50 --encoder encoder_q --shards s3://set/train --out out
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a job's copy of the project is not installed


from isd_ray.messages import Arguments, place, say
from isd_ray.supervisor import run

PARSER = Arguments(__doc__)
network = PARSER.add_mutually_exclusive_group(required=True)
network.add_argument("--run", type=place, help="folder or URI of a run")
network.add_argument(
    "--weights", type=place, help="file of weights: backbone.safetensors of a run, .safetensors or .pth"
)
images = PARSER.add_mutually_exclusive_group()
images.add_argument(
    "--shards", type=place, help="folder or URI with an index of shards (default: the images of the run)"
)
images.add_argument("--dataset", help="name of a definition in datasets/")
option = PARSER.add_argument
option("--out", type=place, required=True, help="folder or URI that gets part-000000.parquet, ...")
option("--network", default="student", choices=["student", "teacher"], help="network of the run")
option("--checkpoint", help="name of a checkpoint of the run (default: the newest)")
option("--backbone", help="backbone of the weights, where the file does not say: resnet50, timm:NAME, ...")
option("--stem", default="auto", help="its first layers: auto, cifar, imagenet, stride2")
option("--encoder", default="", help="beginning of the keys in .pth weights: encoder_q, encoder_k")
option("--image-size", type=int, help="side of the view with --weights (the file's, else 224)")
option("--split", default="train", choices=["train", "bank", "test"], help="of the data set or the run")
option("--root", type=place, help="folder of the raw data set")
option("--dtype", default="float32", choices=["float32", "float16"], help="numbers of the embeddings")
option("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: CUDA where there are GPUs")
option("--workers", type=int, help="Ray actors (one a GPU, or a core but one); 0: this process")
option("--batch-size", type=int, default=256, help="images a forward pass (256)")
option("--max-bad", type=float, default=0.01, help="largest share of broken images (0.01)")


def main(arguments: list[str]) -> int:
    """Run the job; the exit codes are those of isd_ray.ending."""
    given = PARSER.parse_args(arguments)
    from isd_ray.train.encoder import embed_job

    say(embed_job(**vars(given)))
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))

"""One evaluation for every model: the same numbers, from the same features, with the protocol stored beside
them.

`evaluate_features` scores one set of features; `evaluate_encoders` scores a student, a teacher, an untrained
backbone and raw pixels side by side, because an accuracy means little without its floor.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.evaluate.collapse import normalised_std, rankme, uniformity
from isd_ray.evaluate.features import Images, View, extract, pixels
from isd_ray.evaluate.groups import class_groups, scores
from isd_ray.evaluate.knn import check_labels, majority_vote, neighbours, weighted_vote
from isd_ray.evaluate.linear import ISD_RECIPE, LinearRecipe
from isd_ray.evaluate.linear import linear as train_linear

SECTIONS = ("metrics", "class_mean", "groups", "std", "per_class")

PROTOCOL: dict[str, dict[str, Any]] = {
    "knn1": {"name": "isd_knn", "version": 1, "k": 1, "vote": "majority, ties at random"},
    "knn20": {"name": "isd_knn", "version": 1, "k": 20, "vote": "majority, ties at random"},
    "knn200_weighted": {
        "name": "npid_knn",
        "version": 1,
        "k": 200,
        "vote": "weighted by exp(similarity / temperature)",
        "temperature": 0.07,
    },
}
for _metric in PROTOCOL.values():
    _metric |= {"normalisation": "l2", "similarity": "cosine"}


def evaluate_features(
    bank: Tensor,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    train_counts: Sequence[int] | Tensor,
    groups: str | Mapping[str, int] = "thirds",
    knn_metrics: Sequence[str] = tuple(PROTOCOL),
    linear: bool = True,
    linear_recipe: LinearRecipe = ISD_RECIPE,
    bank_name: str = "unnamed",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Score features `test` [Q, d] against the labelled `bank` [N, d], which also trains the linear
    classifier.

    train_counts [C]: images a class in the *pretraining* subset, from which the groups follow (see
    `class_groups`); groups: their rule, or thresholds {"many": 100, "few": 20}. Returns, in percent: `metrics`
    {metric: accuracy}, `class_mean` {metric: %}, `groups` {metric: {group: %}}, `std` {metric: %}, `per_class`
    {metric: [C]}, and `protocol`. A metric whose k exceeds the bank is None everywhere and its protocol says so
    under `left_out`: a 200-NN over fewer images is another metric, so k is never changed silently. Raises
    UserError for labels out of range, and for features that are not finite (a diverged model).
    """
    _check(bank, bank_labels, classes, "bank")
    _check(test, test_labels, classes, "test set")
    if len(train_counts) != classes:
        raise UserError(
            f"train_counts has {len(train_counts)} entries for {classes} classes: give one a class."
        )
    rule: dict[str, Any] = {"by": groups} if isinstance(groups, str) else {"by": "thresholds", **groups}
    members = class_groups(train_counts, **rule)
    predictions, protocol = _predict_knn(bank, bank_labels, test, knn_metrics, classes, seed, device)
    if linear:
        predictions["linear"], protocol["linear"] = train_linear(
            [bank.to(device)],
            bank_labels,
            test.to(device),
            classes=classes,
            recipe=linear_recipe,
            seed=seed,
        )
    protocol["bank"] = _describe_bank(bank_name, bank_labels, classes)
    protocol["test"] = {"images": len(test_labels)}
    protocol["groups"] = {**rule, "classes": members, "train_counts": [int(n) for n in train_counts]}
    scored = {
        m: p if p is None else scores(p, test_labels.cpu(), classes, members) for m, p in predictions.items()
    }
    keys = {"metrics": "accuracy"}
    result: dict[str, Any] = {
        section: {m: s and s[keys.get(section, section)] for m, s in scored.items()} for section in SECTIONS
    }
    return result | {"protocol": protocol}


def evaluate_encoders(
    encoders: Mapping[str, nn.Module],
    bank_images: Images,
    bank_labels: Tensor,
    test_images: Images,
    test_labels: Tensor,
    *,
    view: View,
    classes: int,
    with_pixels: bool = True,
    pixel_size: int | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    progress: Callable[[str], None] = lambda name: None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate each encoder, e.g. {"student": ..., "teacher": ..., "untrained": ...}, and raw pixels as
    "pixels".

    Images are uint8 [N, C, H, W], or a list or loader of such batches (it is read once an encoder). `view`
    makes the centre view; `pixel_size` scales images for the pixel features. `progress` is called with the
    name of what comes next; `options` go to
    `evaluate_features` (`train_counts` is needed). The encoders must lie on `device`. Returns
    the sections of `evaluate_features`, each below the encoder's name (`metrics.student.knn20`), `collapse`
    {name: {dim, std, rankme, uniformity}} of the test features, `protocol`, and `seconds` {name: s}.
    """
    for images in (bank_images, test_images):
        if not isinstance(images, Tensor) and iter(images) is images:
            raise UserError(
                "Images come as an iterator, which can be read only once: pass a tensor, list or loader."
            )

    def features(name: str, images: Images) -> Tensor:
        if name == "pixels":
            return pixels(images, pixel_size)
        return extract(encoders[name], images, view, batch_size=batch_size, device=device)

    result: dict[str, Any] = {section: {} for section in (*SECTIONS, "collapse", "protocol", "seconds")}
    for name in [*encoders, *(["pixels"] if with_pixels else [])]:
        progress(name)
        start = time.perf_counter()
        bank, test = features(name, bank_images), features(name, test_images)
        try:
            one = evaluate_features(
                bank, bank_labels, test, test_labels, classes=classes, device=device, **options
            )
        except UserError as error:
            raise UserError(f"Evaluation of {name}: {error}") from None
        for section in SECTIONS:
            result[section][name] = one[section]
        if name != "pixels":
            result["collapse"][name] = describe_spread(test)
        result["protocol"] = one["protocol"]
        result["seconds"][name] = round(time.perf_counter() - start, 3)
    result["protocol"]["features"] = {"mode": "eval", "view": "centre", "pixels": "raw, [0, 1]"}
    return result


def describe_spread(features: Tensor) -> dict[str, float]:
    """Return dimension and label-free measures of collapse of features [N, d]."""
    return {
        "dim": features.shape[1],
        "std": normalised_std(features),
        "rankme": rankme(features),
        "uniformity": uniformity(features),
    }


def _predict_knn(
    bank: Tensor, bank_labels: Tensor, test: Tensor, metrics: Sequence[str], classes: int, seed: int,
    device: str | torch.device,
) -> tuple[dict[str, Tensor | None], dict[str, Any]]:  # fmt: skip
    """Predictions and protocol of each kNN metric; the neighbours are searched once, for the largest k that
    fits.
    """
    protocol = {metric: PROTOCOL[metric] | {"seed": seed} for metric in metrics}
    fitting = [p["k"] for p in protocol.values() if p["k"] <= len(bank)]
    predictions: dict[str, Tensor | None] = {}
    if fitting:
        similarity, row = neighbours(bank, test.to(device), max(fitting))
        labels = bank_labels.cpu()[row]
    for metric, p in protocol.items():
        k = p["k"]
        if k > len(bank):
            predictions[metric] = None
            p["left_out"] = f"the bank has {len(bank)} images, fewer than k = {k}"
        elif "temperature" in p:
            predictions[metric] = weighted_vote(
                similarity[:, :k], labels[:, :k], classes, p["temperature"], seed
            )
        else:
            predictions[metric] = majority_vote(labels[:, :k], classes, seed)
    return predictions, protocol


def _check(features: Tensor, labels: Tensor, classes: int, name: str) -> None:
    check_labels(labels, len(features), classes, name)
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:
        raise UserError(
            f"{broken} of {len(features)} feature vectors of the {name} are not finite: "
            f"the model diverged; evaluate an earlier checkpoint or lower the learning rate."
        )


def _describe_bank(name: str, labels: Tensor, classes: int) -> dict[str, Any]:
    """Accuracies against a long-tailed and a balanced bank are different metrics: say which this is."""
    counts = torch.bincount(labels.cpu(), minlength=classes)
    return {
        "name": name,
        "images": len(labels),
        "largest_class": int(counts.max()),
        "smallest_class": int(counts.min()),
    }

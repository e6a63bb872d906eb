"""One evaluation for every model: the same numbers, from the same features, with their protocol.

`evaluate_features` scores one set of features; `evaluate_encoders` scores a student, a teacher, an untrained
backbone and raw pixels side by side, because an accuracy means little without its floor. A protocol
is a record of its own (`isd_ray/evaluate/protocols/`); nothing here knows one by name.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from isd_ray.errors import UserError
from isd_ray.evaluate.collapse import describe_spread
from isd_ray.evaluate.features import Images, View, extract, pixels
from isd_ray.evaluate.groups import Groups, class_groups, mean_of, scores
from isd_ray.evaluate.knn import check_labels
from isd_ray.evaluate.linear import ISD_RECIPE, LinearRecipe
from isd_ray.evaluate.names import DEFAULT, parse
from isd_ray.evaluate.protocol import Answer, Labelled, Name, Search, TransferFeatures

SECTIONS = ("metrics", "class_mean", "groups", "std", "per_class", "details")


def evaluate_features(
    bank: Tensor | None,
    bank_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    classes: int,
    train_counts: Sequence[int] | Tensor,
    groups: str | Mapping[str, int] = "thirds",
    protocols: Sequence[str] = DEFAULT,
    transfer: Mapping[str, TransferFeatures] | None = None,
    search: Search | None = None,
    linear_recipe: LinearRecipe = ISD_RECIPE,
    bank_name: str = "unnamed",
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Score features `test` [Q, d] against the labelled `bank` [N, d], which also trains the classifiers.

    train_counts [C]: images a class in the *pretraining* subset, from which the groups follow (see
    `class_groups`); groups: their rule, or thresholds {"many": 100, "few": 20}; protocols: see `names.py`. transfer:
    features of the sets that `transfer/SET` names. bank None: it does not fit into memory; `search` then finds the
    neighbours, and what needs the whole bank is left out.

    Returns, in percent: `metrics` {metric: accuracy}, `class_mean` {metric: %}, `groups` {metric: {group: %}}, `std`
    {metric: %}, `per_class` {metric: [C]}, and `details` {metric: {...}} and `protocol`. A metric that cannot be had,
    as a k beyond the bank, is None everywhere and its protocol says so under `left_out`: a 200-NN over fewer images is
    another metric, so k is never changed silently. A protocol whose answer is a number has
    `metrics` alone.
    Raises UserError for unknown protocols, for labels out of range, and for features that are not finite (a diverged
    model).
    """
    names = {name: parse(name) for name in protocols}
    if bank is not None:
        _check(bank, bank_labels, classes, "bank")
    _check(test, test_labels, classes, "test set")
    if len(train_counts) != classes:
        raise UserError(
            f"train_counts has {len(train_counts)} entries for {classes} classes: give one a class."
        )
    rule: dict[str, Any] = {"by": groups} if isinstance(groups, str) else {"by": "thresholds", **groups}
    members = class_groups(train_counts, **rule)
    left_out = _left_out(names, bank is None, bank_labels, test_labels, classes, transfer or {})
    data = Labelled(
        asked=[name for metric, name in names.items() if metric not in left_out],
        bank=_placed(bank, device),
        bank_labels=bank_labels,
        test=test,
        test_labels=test_labels,
        classes=classes,
        seed=seed,
        device=device,
        search=search,
        transfer=transfer or {},
        linear_recipe=linear_recipe,
    )
    result = _measured(names, data, left_out, members)
    result["protocol"]["bank"] = _describe_bank(bank_name, bank_labels, classes)
    result["protocol"]["test"] = {"images": len(test_labels)}
    counts = [int(n) for n in train_counts]
    result["protocol"]["groups"] = {**rule, "classes": members, "train_counts": counts}
    return result


def _measured(
    names: Mapping[str, Name], data: Labelled, left_out: Mapping[str, str], groups: Groups
) -> dict[str, Any]:
    """Run the protocols; returns the sections and `protocol`."""
    result: dict[str, Any] = {section: {} for section in (*SECTIONS, "protocol")}
    protocol: dict[str, Any]
    for metric, name in names.items():
        if metric in left_out:
            protocol = {"name": metric, "left_out": left_out[metric]}
            scored: dict[str, Any] = dict.fromkeys(SECTIONS)
        else:
            answer = name.protocol.run(data, name)
            protocol = {"name": metric, "version": name.protocol.version} | answer.settings
            scored = _scored(answer, data, groups)
        result["protocol"][metric] = protocol
        for section in SECTIONS:
            result[section][metric] = scored[section]
    return result


def _left_out(
    names: Mapping[str, Name], no_bank: bool, bank_labels: Tensor, test_labels: Tensor, classes: int,
    transfer: Mapping[str, TransferFeatures],
) -> dict[str, str]:  # fmt: skip
    """Say of each metric that cannot be had, why."""
    counts = [torch.bincount(y.cpu(), minlength=classes).tolist() for y in (bank_labels, test_labels)]
    reasons = {}
    for metric, name in names.items():
        reason = name.impossible(*counts)
        if reason is None and no_bank and name.protocol.whole_bank:
            reason = "the bank does not fit into this machine's memory"
        if reason is None and name.protocol.other_set and name.target not in transfer:
            reason = "there are no features of this set"
        if reason is not None:
            reasons[metric] = reason
    return reasons


def _scored(answer: Answer, data: Labelled, groups: Groups) -> dict[str, Any]:
    """The sections of one metric; of several draws the means."""
    if answer.value is not None:
        return dict.fromkeys(SECTIONS) | {"metrics": answer.value, "details": answer.details}
    own = answer.labels is not None
    wanted = (answer.labels if own else data.test_labels).cpu()  # type: ignore[union-attr]
    classes, groups = (answer.classes, {}) if own else (data.classes, groups)
    draws = [scores(found, wanted, classes, groups) for found in answer.predictions]
    one = mean_of(draws)
    one["metrics"] = one["class_mean" if answer.by_class_mean else "accuracy"]
    one["details"] = dict(answer.details)
    if len(draws) > 1:
        one["details"]["accuracy_of_draws"] = [draw["accuracy"] for draw in draws]
    return one


def _placed(bank: Tensor | None, device: str | torch.device) -> Tensor | None:
    """The bank on the device where it takes at most half of what is free there, else in main memory."""
    if bank is None or torch.device(device).type != "cuda":
        return bank
    free, _ = torch.cuda.mem_get_info(device)
    return bank.to(device) if bank.numel() * bank.element_size() <= free // 2 else bank


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
    `evaluate_features` (`train_counts` is needed). The encoders must lie on `device`. Returns what `side_by_side`
    does.
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

    names = [*encoders, *(["pixels"] if with_pixels else [])]

    def evaluate(name: str) -> tuple[dict[str, Any], Tensor]:
        bank, test = features(name, bank_images), features(name, test_images)
        return evaluate_features(
            bank, bank_labels, test, test_labels, classes=classes, device=device, **options
        ), test

    return side_by_side(names, evaluate, progress)


def side_by_side(
    names: Sequence[str],
    evaluate: Callable[[str], tuple[dict[str, Any], Tensor]],
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Evaluate each of `names` in turn; `evaluate` returns what `evaluate_features` does, and the test features [Q, d].

    Returns the sections of `evaluate_features`, each below the network's name (`metrics.student.knn20`), `collapse`
    {name: measures of the test features}, `protocol`, and `seconds` {name: s}.
    """
    result: dict[str, Any] = {section: {} for section in (*SECTIONS, "collapse", "protocol", "seconds")}
    for name in names:
        progress(name)
        start = time.perf_counter()
        try:
            one, test = evaluate(name)
        except UserError as error:
            raise UserError(f"Evaluation of {name}: {error}") from None
        for section in SECTIONS:
            result[section][name] = one[section]
        if name != "pixels":
            result["collapse"][name] = describe_spread(test)
        result["protocol"] = one["protocol"] | result["protocol"]
        result["seconds"][name] = round(time.perf_counter() - start, 3)
    result["protocol"]["features"] = {"mode": "eval", "view": "centre", "pixels": "raw, [0, 1]"}
    return result


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

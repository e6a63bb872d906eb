"""Logistic regression on another set, reported by the set's own metric."""

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol
from isd_ray.evaluate.transfer_sets import TRANSFER_SETS


def run(data: Labelled, name: Name) -> Answer:
    """Choose the penalty on validation images, fit on all labelled ones (isd_ray/evaluate/logistic.py)."""
    from isd_ray.evaluate import logistic

    chosen, other = TRANSFER_SETS[name.target], data.transfer[name.target]
    own = other.validation
    found, settings, details = logistic.transfer(
        other.train.to(data.device),
        other.train_labels,
        other.test.to(data.device),
        classes=other.classes,
        metric=chosen.metric,
        validation=None if own is None else (own[0].to(data.device), own[1]),
        seed=data.seed,
    )
    settings |= {"set": chosen.torchvision, "test_images": len(other.test_labels)}
    settings |= {"note": chosen.note} if chosen.note else {}
    return Answer(settings, [found], None, other.test_labels, other.classes, chosen.by_class_mean, details)


TRANSFER = Protocol(
    form="transfer/SET",
    pattern=f"transfer/(?P<target>{'|'.join(TRANSFER_SETS)})",
    examples=tuple(f"transfer/{name}" for name in TRANSFER_SETS),
    help="logistic regression on another set",
    title="to\n{target}",
    run=run,
    by_class=False,
    bank=False,
    test=False,
    other_set=True,
)

"""Do the classes lie apart in the test features as they are, each class counting alike?"""

from collections.abc import Sequence

from isd_ray.evaluate.protocol import Answer, Labelled, Name, Protocol


def run(data: Labelled, name: Name) -> Answer:
    """The mean over classes of the mean silhouette of the class's test images.

    Rousseeuw, 1987, with the distance 1 - cosine: 100 is classes far apart, below 0 an image lies
    nearer to another class than to its own. The labels stand in the place of clusters.
    """
    from sklearn.metrics import silhouette_samples

    labels = data.test_labels.cpu()
    features = data.test.float().cpu().numpy()
    values = silhouette_samples(features, labels.numpy(), metric="cosine")
    means = [float(values[(labels == c).numpy()].mean()) for c in labels.unique()]
    settings = {
        "name": "silhouette",
        "features": "test set",
        "distance": "1 - cosine",
        "mean": "over classes of the mean over images",
        "scale": "times 100",
    }
    return Answer(settings, value=100 * sum(means) / len(means))


def why_impossible(name: Name, bank: Sequence[int], test: Sequence[int]) -> str | None:
    """There must be another class, and an image that is not alone in its class."""
    classes, images = sum(1 for n in test if n), sum(test)
    if classes < 2:
        return f"the test set has {classes} classes; distances are compared between at least 2"
    alone = classes == images
    return f"each of the {classes} classes has one test image; some must have 2" if alone else None


SILHOUETTE = Protocol(
    form="silhouette",
    pattern="silhouette",
    examples=("silhouette",),
    help="mean over classes of the silhouette of their test images by cosine, times 100",
    title="silhouette\nby class",
    run=run,
    why_impossible=why_impossible,
    cheap=True,
    by_class=False,
    bank=False,
)

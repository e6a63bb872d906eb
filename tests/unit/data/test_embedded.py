"""The embedded set is the same on every machine, its splits share no image, and raw pixels say little."""

import hashlib

import numpy as np
import pytest

from isd_ray.data.embedded import CLASSES, make


@pytest.fixture(scope="module")
def splits():
    return {split: make(split) for split in ("train", "bank", "test")}


DIGESTS = [("train", 600, "48a22549"), ("bank", 150, "2232dcad"), ("test", 100, "e5c84681")]


@pytest.mark.parametrize(("split", "each", "digest"), DIGESTS)
def test_the_same_bytes_on_every_machine(splits, split, each, digest):
    images, labels = splits[split]
    assert images.shape == (each * len(CLASSES), 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [each] * len(CLASSES)
    assert hashlib.sha256(images.tobytes()).hexdigest().startswith(digest)


def test_splits_share_no_image(splits):
    kept = [image.tobytes() for images, _ in splits.values() for image in images]
    assert len(set(kept)) == len(kept)


def test_another_seed_draws_other_images(splits):
    assert not np.array_equal(make("test", seed=1)[0], splits["test"][0])


def test_raw_pixels_say_little(splits):
    from sklearn.neighbors import KNeighborsClassifier

    (bank, bank_labels), (test, test_labels) = splits["bank"], splits["test"]
    neighbours = KNeighborsClassifier(20, metric="cosine").fit(
        bank.reshape(len(bank), -1) / 255.0, bank_labels
    )
    accuracy = neighbours.score(test.reshape(len(test), -1) / 255.0, test_labels)
    assert 0.1 < accuracy < 0.35

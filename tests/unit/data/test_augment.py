"""Views: every operation against torchvision's, one image at a time; random numbers against chance."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from isd_ray.data import colour
from isd_ray.data import views as v
from isd_ray.data.augment import VIEWS, View, center_view, crop, draws, make_views, photometric
from isd_ray.data.stream import Batch
from isd_ray.errors import UserError

LEVEL = 1 / 255
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@pytest.fixture
def images() -> torch.Tensor:
    """Smooth random images with some flat and grey ones, float [12, 3, 40, 40] on the 8-bit grid."""
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.interpolate(
        torch.rand(12, 3, 10, 10, generator=generator), (40, 40), mode="bicubic"
    )
    x[0] = 0.5
    x[1] = x[1, :1]
    return (x.clamp(0, 1) * 255).round() / 255


def batch_of(images: torch.Tensor, epoch: int = 0, first: int = 0) -> Batch:
    """A batch of whole images from float [b, 3, H, W]."""
    number = torch.arange(first, first + len(images))
    return Batch((images * 255).round().byte()[:, None], number, number * 0 - 1, number, epoch, 7)


@pytest.mark.parametrize(
    ("ours", "reference", "low", "high"),
    [
        (colour.brightness, tv.adjust_brightness, 0.2, 1.8),
        (colour.contrast, tv.adjust_contrast, 0.2, 1.8),
        (colour.saturation, tv.adjust_saturation, 0.2, 1.8),
        (colour.hue, tv.adjust_hue, -0.5, 0.5),
        (colour.blur, lambda x, sigma: tv.gaussian_blur(x, [13, 13], [sigma, sigma]), 0.1, 2.0),
    ],
)
def test_colour_operations_equal_torchvision(images, ours, reference, low, high):
    parameter = torch.linspace(low, high, len(images))
    found = ours(images, parameter, 2.0) if ours is colour.blur else ours(images, parameter)
    expected = torch.stack([reference(x, p.item()) for x, p in zip(images, parameter, strict=True)])
    assert (found - expected).abs().max() < LEVEL / 4


def test_grey_and_solarize_equal_torchvision(images):
    assert torch.allclose(colour.grey(images), tv.rgb_to_grayscale(images, 3), atol=1e-6)
    assert torch.equal(colour.solarize(images), tv.solarize(images, 128 / 255))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width", "side"), [(40, 40, 32), (40, 40, 24), (30, 50, 64)])
def test_crop_equals_resized_crop(images, mode, height, width, side):
    x = images[..., :height, :] if height < 40 else images
    x = tv.resize(x, [height, width], antialias=True)
    view = View(scale=(0.05, 1.0), interpolation=mode)
    u = v.view_draws(1, 2, np.arange(len(x)), 1)[0]
    boxes = v.crop_boxes(view, u, np.full(len(x), width), np.full(len(x), height))
    found = crop(x, view, u, side)
    how = InterpolationMode(mode)
    for i, (box, mirrored) in enumerate(zip(boxes.tolist(), v.flipped(view, u), strict=True)):
        expected = tv.resized_crop(x[i], *box, [side, side], how, antialias=True).clamp(0, 1)
        expected = tv.horizontal_flip(expected) if mirrored else expected
        assert (found[i] - expected).abs().max() < LEVEL / 2


def test_crop_boxes_follow_torchvision_in_law():
    """Mean and spread of place and size over 5,000 boxes each, against RandomResizedCrop.get_params."""
    from torchvision.transforms import RandomResizedCrop

    n, width, height = 5_000, 60, 40
    u = draws(0, 0, np.arange(n), v.NUMBERS)
    ours = v.crop_boxes(View(scale=(0.2, 1.0)), u, np.full(n, width), np.full(n, height))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)])
    for box in (ours, theirs):
        assert (box[:, :2] >= 0).all()
        assert (box[:, 0] + box[:, 2] <= height).all()
        assert (box[:, 1] + box[:, 3] <= width).all()
    error = 5 * theirs.std(0) * np.sqrt(2 / n)
    assert (np.abs(ours.mean(0) - theirs.mean(0)) < error).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.08)


def test_a_very_long_image_falls_back_to_the_centre():
    u = draws(0, 0, np.arange(5), v.NUMBERS)
    boxes = v.crop_boxes(View(scale=(1.0, 1.0)), u, np.full(5, 300), np.full(5, 30))
    assert (boxes == [0, 130, 30, 40]).all()


def test_photometric_equals_one_by_one(images):
    """The whole chain, with its random order, against torchvision's functions called a sample at a time."""
    view = replace(VIEWS["byol_2"], blur_p=0.5, blur_from=0, solarize_p=0.5)
    u = draws(3, 1, np.arange(len(images)), v.NUMBERS)
    found = photometric(images.clone(), view, u)
    for i, row in enumerate(u):
        x = images[i]
        if row[v.JITTER] < view.jitter_p:
            jitter = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
            signed = (2 * row[v.FACTORS] - 1) * view.jitter
            for k in np.argsort(row[v.ORDER]):
                x = jitter[k](x, float(signed[k] + (k < 3)))
        if row[v.GREY] < view.grey_p:
            x = tv.rgb_to_grayscale(x, 3)
        if row[v.BLUR] < view.blur_p:
            x = tv.gaussian_blur(x, [13, 13], [0.1 + 1.9 * row[v.SIGMA]] * 2)
        before = x
        if row[v.SOLARIZE] < view.solarize_p:
            x = tv.solarize(x, 128 / 255)
        sure = (before - 128 / 255).abs() > 1e-5  # at the threshold itself, a rounding error decides
        assert ((found[i] - x).abs() < LEVEL)[sure].all()


def test_views_depend_on_seed_epoch_and_position_alone(images):
    names = ["weak", "strong", "byol_2", "swav_small"]
    whole = make_views(batch_of(images), names, 40, ZERO, ONE)
    part = make_views(batch_of(images[5:9], first=5), names, 40, ZERO, ONE)
    for a, b in zip(whole, part, strict=True):
        assert torch.allclose(a[5:9], b, atol=1e-5)
    later = make_views(batch_of(images, epoch=1), names, 40, ZERO, ONE)
    assert not torch.allclose(whole[0], later[0], atol=0.1)


def test_two_views_of_one_recipe_differ_and_a_change_of_recipe_leaves_the_other_alone(images):
    first, second = make_views(batch_of(images), ["weak", "weak"], 40, ZERO, ONE)
    assert not torch.allclose(first, second, atol=0.1)
    again, _ = make_views(batch_of(images), ["weak", "simclr"], 40, ZERO, ONE)
    assert torch.equal(first, again)


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_every_recipe_gives_finite_normalised_floats(images, name):
    (x,) = make_views(batch_of(images), [name], 64, (0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
    side = 27 if name.endswith("_small") else 64
    assert x.shape == (12, 3, side, side)
    assert x.dtype == torch.float32
    low, high = torch.tensor([-2.5, -1.6, -1.0]), torch.tensor([2.5, 2.4, 7 / 3])
    assert (x.amin((0, 2, 3)) >= low - 1e-4).all()
    assert (x.amax((0, 2, 3)) <= high + 1e-4).all()


def test_small_views_are_not_blurred_unless_asked(images):
    sharp, asked = VIEWS["strong"], replace(VIEWS["strong"], blur_from=0)
    without = replace(sharp, blur_p=0.0)
    a, b, c = (make_views(batch_of(images), [view], 32, ZERO, ONE)[0] for view in (sharp, without, asked))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_cropped_images_are_not_cropped_again(images):
    crops = (images[:6, None].repeat(1, 2, 1, 1, 1) * 255).round().byte()
    number = torch.arange(6)
    batch = Batch(crops, number, number, number, 0, 0, cropped=True)
    weak, small = make_views(batch, ["weak", replace(VIEWS["weak"], side=0.5)], 40, ZERO, ONE)
    assert torch.allclose(weak, images[:6], atol=1e-6)
    assert torch.allclose(small, images[:6, :, :20, :20], atol=1e-6)
    with pytest.raises(ValueError, match="2 crops for 1 views"):
        make_views(batch, ["weak"], 40, ZERO, ONE)


def test_unknown_view_names_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'strong'"):
        v.get_views(["stron"])


def test_center_view(images):
    raw = (images * 255).round().byte()
    assert torch.allclose(center_view(raw, 40, ZERO, ONE), images, atol=1e-6)
    wide = tv.resize(raw, [90, 120], antialias=True)
    expected = tv.center_crop(tv.resize(wide.float() / 255, [80], antialias=True), [70, 70])
    assert torch.allclose(center_view(wide, 70, ZERO, ONE), expected, atol=1e-6)
    assert center_view(wide, 32, ZERO, ONE).shape[-2:] == (32, 32)


def test_draws_are_pure_and_counter_based():
    position = np.arange(50)
    whole = draws(1, 2, position, 9)
    assert whole.dtype == np.float64
    assert (whole >= 0).all()
    assert (whole < 1).all()
    assert np.array_equal(draws(1, 2, position[20:30], 9), whole[20:30])
    assert np.array_equal(draws(1, 2, position, 4), whole[:, :4])


def test_draws_are_uniform():
    """Chi-squared with 256 cells in each of 16 columns: mean 255, deviation 22.6; six deviations allowed."""
    u = draws(0, 0, np.arange(25_600), 16)
    for column in u.T:
        counts = np.bincount((column * 256).astype(int), minlength=256)
        assert 255 - 6 * 22.6 < ((counts - 100) ** 2 / 100).sum() < 255 + 6 * 22.6


@pytest.mark.parametrize(
    "other",
    [
        lambda p: draws(0, 0, p + 1, 8),
        lambda p: draws(0, 1, p, 8),
        lambda p: draws(1, 0, p, 8),
        lambda p: np.roll(draws(0, 0, p, 9), 1, axis=1)[:, :8],
    ],
    ids=["position", "epoch", "seed", "column"],
)
def test_draws_next_to_each_other_are_independent(other):
    """Correlation and joint chi-squared (16 x 16 cells: mean 255) of neighbours in every argument."""
    position = np.arange(20_000)
    a, b = draws(0, 0, position, 8), other(position)
    for x, y in zip(a.T, b.T, strict=True):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / np.sqrt(len(position))
        counts = np.histogram2d(x, y, 16, [[0, 1], [0, 1]])[0]
        expected = len(position) / 256
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * 22.6


def test_blur_by_taps_equals_blur_by_matrices(images):
    height, width = images.shape[-2:]
    sigma = torch.linspace(0.1, 2.0, len(images))
    rows, columns = (colour.blur_matrices(sigma, size, 6) for size in (height, width))
    expected = colour.separable(images, rows, columns)
    assert torch.allclose(colour.blur(images, sigma, 2.0), expected, atol=1e-6)


def test_a_batch_larger_than_the_cache_gets_the_same_colours(images, monkeypatch):
    view = replace(VIEWS["strong"], blur_from=0)
    rows = torch.arange(len(images))
    pixels = images.mul(255).round().to(torch.uint8)[:, None]
    batch = Batch(pixels, rows, rows, rows, epoch=0, seed=0, cropped=True)
    (whole,) = make_views(batch, [view], pixels.shape[-1], ZERO, ONE)
    monkeypatch.setattr(colour, "CACHE_BYTES", 1)
    (by_image,) = make_views(batch, [view], pixels.shape[-1], ZERO, ONE)
    assert torch.allclose(by_image, whole, atol=5e-4)  # blur leaves out other weights


def test_one_crop_box_equals_its_row_of_many():
    sizes = np.random.default_rng(0).integers(1, 900, (2000, 2))
    sizes[:300, 0] = sizes[:300, 1] * 20  # so long that often no try fits
    u = v.view_draws(0, 0, np.arange(2000), 1)[0]
    for view in (VIEWS["strong"], VIEWS["swav_small"]):
        share, ratio = v.crop_tries(view, u)
        top_left = u[:, [v.TOP, v.LEFT]].tolist()
        found = [v.crop_box(share[i], ratio[i], *top_left[i], *size) for i, size in enumerate(sizes.tolist())]
        assert found == [tuple(box) for box in v.crop_boxes(view, u, *sizes.T).tolist()]

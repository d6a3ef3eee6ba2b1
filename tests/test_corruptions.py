"""Corruptions: the laws of all families, the order of severities, and other implementations as oracles."""

import io
import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage, stats
from skimage import color, data, util
from torch import Tensor

from gmscale.errors import UsageError
from gmscale.evaluation.corruptions import EXTRA, FAMILIES, SEVERITIES, corrupt
from gmscale.evaluation.corruptions.blur import defocus_blur, streaked
from gmscale.evaluation.corruptions.corrupt import severities
from gmscale.evaluation.corruptions.digital import elastic_places
from gmscale.evaluation.corruptions.filters import gaussian, length, plasma, zoomed
from gmscale.evaluation.draws import uniform

ALL = (*FAMILIES, *EXTRA)
DRAWN = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise"),
    *("glass_blur", "motion_blur", "snow", "frost", "fog", "spatter", "elastic_transform"),
}
STEP = 1 / 255


@cache
def photographs(side: int) -> Tensor:
    """Six 8-bit pictures of three scenes, [6, 3, side, side]."""
    scenes = []
    for scene in (data.astronaut(), data.chelsea(), data.coffee()):
        square = min(scene.shape[:2])
        pixels = torch.from_numpy(scene[:square, :square].copy()).permute(2, 0, 1)[None] / 255
        scenes.append(F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True))
    pixels = torch.cat(scenes)
    return (torch.cat((pixels, pixels.flip(-1))) * 255).round() / 255


def made(family: str, severity: int, pixels: Tensor, seed: int = 0) -> Tensor:
    return corrupt(pixels, family, severity, torch.arange(len(pixels)), seed)


def change(family: str, severity: int, side: int) -> float:
    pixels = photographs(side)
    return float((made(family, severity, pixels) - pixels).abs().mean())


def flat(value: float, count: int = 20, side: int = 64, channels: int = 3) -> Tensor:
    return torch.full((count, channels, side, side), value)


# ---- laws --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
def test_what_comes_back_is_an_8_bit_image(family: str) -> None:
    for pixels in (photographs(32), photographs(64)[:, :, :40], photographs(8), torch.zeros(1, 3, 32, 32)):
        before = pixels.clone()
        for severity in (1, 5):
            corrupted = made(family, severity, pixels)
            assert corrupted.shape == pixels.shape
            assert corrupted.dtype == torch.float32
            assert corrupted.min() >= 0
            assert corrupted.max() <= 1
            assert torch.equal((corrupted * 255).round() / 255, corrupted)  # not for NaN
            assert corrupted.data_ptr() != pixels.data_ptr()
        assert torch.equal(pixels, before)


@pytest.mark.parametrize("family", ALL)
def test_an_image_does_not_depend_on_its_batch(family: str) -> None:
    pixels, order = photographs(33), torch.tensor([3, 0, 5, 1, 4, 2])
    for severity in (1, 4):
        whole = made(family, severity, pixels)
        parts = torch.cat([corrupt(pixels[o], family, severity, o, 0) for o in order.split((1, 3, 2))])
        differs = (parts - whole[order]).abs()
        assert differs.max() <= 1.01 * STEP  # sums of another alignment may round otherwise
        assert (differs > 0).float().mean() < 1e-4


@pytest.mark.parametrize("family", sorted(DRAWN))
def test_draws_depend_on_the_sample_and_the_seed(family: str) -> None:
    picture = photographs(32)[:1]
    of_two = made(family, 3, picture.expand(2, -1, -1, -1))
    assert (of_two[0] - of_two[1]).abs().mean() > 0.002
    assert (made(family, 3, picture, seed=1) - of_two[:1]).abs().mean() > 0.002


@pytest.mark.parametrize("family", sorted({*ALL} - DRAWN))
def test_the_others_draw_nothing(family: str) -> None:
    of_two = made(family, 3, photographs(32)[:1].expand(2, -1, -1, -1))
    assert torch.equal(of_two[0], of_two[1])


@pytest.mark.parametrize("family", sorted({*ALL} - {"saturate"}))
def test_grey_images_are_corrupted_too(family: str) -> None:
    grey = (photographs(32).mean(1, keepdim=True) * 255).round() / 255
    for severity in (1, 5):
        corrupted = made(family, severity, grey)
        assert corrupted.shape == grey.shape
        assert (corrupted - grey).abs().mean() > 0.0005


@pytest.mark.parametrize("family", ["snow", "fog", "spatter"])
def test_what_is_made_twice_is_the_same(family: str) -> None:
    one_by_one = [made(family, severity, photographs(32)) for severity in SEVERITIES]
    together = list(severities(photographs(32), family, torch.arange(6), 0))
    assert all((a - b).abs().max() <= 1.01 * STEP for a, b in zip(one_by_one, together, strict=True))


@pytest.mark.parametrize(
    ("family", "severity", "said"),
    [
        ("gausian_noise", 1, "family is 'gausian_noise'; expected one of"),
        ("fog", 0, "severity is 0; expected a whole number in [1, 5]"),
        ("fog", 6, "severity is 6"),
    ],
)
def test_what_cannot_be_is_refused(family: str, severity: int, said: str) -> None:
    with pytest.raises(UsageError) as error:
        made(family, severity, photographs(8))
    assert said in str(error.value)


def test_grey_has_no_saturation() -> None:
    with pytest.raises(UsageError, match=r"saturate needs images with colour; this model's data\.channels is 1"):
        made("saturate", 1, flat(0.5, channels=1))


# ---- severities --------------------------------------------------------------------------------------------------

# In which ImageNet-C's own parameters do not grow; README.md says why.
BREAKS = {"snow": 2, "elastic_transform": 2, "saturate": 2}
BY_CORRELATION = {"frost", "fog", "spatter"}
LEAST = {"gaussian_blur": 0.015, "defocus_blur": 0.02, "pixelate": 0.02, "jpeg_compression": 0.025}


def decorrelation(family: str, severity: int, side: int) -> float:
    pixels = photographs(side)
    pairs = zip(pixels.flatten(1), made(family, severity, pixels).flatten(1), strict=True)
    return float(torch.stack([1 - torch.stack(pair).corrcoef()[0, 1] for pair in pairs]).mean())


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("family", ALL)
def test_severities_grow(family: str, side: int) -> None:
    measure = decorrelation if family in BY_CORRELATION else change
    found = {severity: measure(family, severity, side) for severity in SEVERITIES}
    for severity in SEVERITIES[:-1]:
        assert severity == BREAKS.get(family) or found[severity] < found[severity + 1]
    assert change(family, 5, side) > LEAST.get(family, 0.03)


def test_snow_grows_around_its_break() -> None:
    assert change("snow", 2, 64) < change("snow", 4, 64)


@pytest.mark.parametrize("side", [32, 64, 224])
def test_elastic_fields_bend_more_and_more(side: int) -> None:
    bending = []
    for severity in SEVERITIES:
        places = elastic_places(photographs(side), severity, lambda n: uniform(torch.arange(6), n, (0, 0)))
        bending.append(float(places.diff(n=2, dim=1).square().mean().sqrt()))
    assert bending[0] < 1e-3  # an affine map
    assert bending == sorted(bending)
    assert bending[-1] > 0.25


def test_lengths_follow_the_image() -> None:
    assert length(10, photographs(224), 0.5) == 10
    assert length(10, flat(0, side=112)) == 5
    assert length(10, flat(0, side=112), 0.5) == 5.25
    assert length(10, flat(0, 1, side=448), 0.5) == 20


# ---- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "deviation"), [(1, 0.08), (2, 0.12)])
def test_gaussian_noise_is_normal(severity: int, deviation: float) -> None:
    noise = (made("gaussian_noise", severity, flat(0.5)) - 0.5).flatten()
    assert float(noise.mean()) == pytest.approx(0, abs=1e-3)
    assert float(noise.std()) == pytest.approx(deviation, rel=0.01)
    assert stats.kurtosis(noise.numpy()) == pytest.approx(0, abs=0.05)


def test_channels_and_neighbours_have_their_own_noise() -> None:
    noise = made("gaussian_noise", 1, flat(0.5)) - 0.5
    pairs = ((noise[:, 0], noise[:, 1]), (noise[..., 1:], noise[..., :-1]), (noise[1:], noise[:-1]))
    for a, b in pairs:
        assert abs(float(torch.stack((a.flatten(), b.flatten())).corrcoef()[0, 1])) < 0.01


def test_speckle_is_in_proportion() -> None:
    for value in (0.1, 0.4):
        noise = made("speckle_noise", 1, flat(value)) - value
        assert float(noise.std()) == pytest.approx(0.15 * value, rel=0.02)


@pytest.mark.parametrize(("severity", "share"), [(1, 0.03), (5, 0.27)])
def test_impulses_are_black_and_white(severity: int, share: float) -> None:
    made_of_grey = made("impulse_noise", severity, flat(102 / 255))
    assert float((made_of_grey == 0).float().mean()) == pytest.approx(share / 2, rel=0.05)
    assert float((made_of_grey == 1).float().mean()) == pytest.approx(share / 2, rel=0.05)
    assert float((made_of_grey == 102 / 255).float().mean()) == pytest.approx(1 - share, rel=0.01)
    theirs = util.random_noise(np.full((200, 200), 0.4), mode="s&p", amount=share, rng=0)
    assert float((theirs == 1).mean()) == pytest.approx(share / 2, rel=0.1)


@pytest.mark.parametrize("value", [0.0, 0.2, 0.6])
@pytest.mark.parametrize(("severity", "photons"), [(1, 60), (3, 12), (5, 3)])
def test_photons_are_poisson(severity: int, photons: int, value: float) -> None:
    counts = (made("shot_noise", severity, flat(value)) * photons).round().flatten().numpy()
    most = photons - 1  # more is white
    found = np.bincount(counts.astype(int), minlength=photons + 1)[: most + 1].cumsum() / len(counts)
    assert np.abs(found - stats.poisson.cdf(np.arange(most + 1), value * photons)).max() < 0.004


# ---- blurs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 2.0, 6.0])
def test_the_gaussian_is_scipys(sigma: float) -> None:
    pixels = photographs(64)
    theirs = ndimage.gaussian_filter(pixels.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
    assert np.abs(gaussian(pixels, sigma).numpy() - theirs).max() < 1e-5


def test_defocus_is_a_disc() -> None:
    point = torch.zeros(1, 3, 224, 224)
    point[..., 112, 112] = 1
    disc = defocus_blur(point, 5, lambda n: torch.zeros(1, n))[0, 0]
    y, x = torch.meshgrid(torch.arange(224) - 112, torch.arange(224) - 112, indexing="ij")
    distance = torch.hypot(x.float(), y.float())
    assert float(disc.sum()) == pytest.approx(1, abs=1e-4)
    assert disc[distance < 9].numpy() == pytest.approx(1 / (math.pi * 100), rel=0.02)
    assert disc[distance > 11].abs().max() < 1e-6


@pytest.mark.parametrize("degrees", [-45, 0, 30, 90])
def test_streaks_go_along_their_angle(degrees: float) -> None:
    point = torch.zeros(1, 1, 224, 224)
    point[..., 112, 112] = 1
    angle = math.radians(degrees)
    streak = streaked(point, torch.tensor([angle]), 20, 15)[0, 0].clamp(min=0)
    y, x = torch.meshgrid(torch.arange(224) - 112.0, torch.arange(224) - 112.0, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    assert float(streak.sum()) == pytest.approx(1, abs=1e-4)
    assert float((streak * across.square()).sum()) < 0.5
    weights = np.exp(-0.5 * (np.arange(41) / 15) ** 2)
    assert float((streak * along).sum()) == pytest.approx((weights * np.arange(41)).sum() / weights.sum(), rel=0.01)
    assert float(streak[along < -1.5].sum()) < 1e-5


def test_motion_stays_within_45_degrees() -> None:
    point = torch.zeros(200, 1, 64, 64)
    point[..., 32, 32] = 1
    streak = made("motion_blur", 5, point)[:, 0]
    y = (streak * (torch.arange(64)[:, None] - 32)).sum((1, 2))
    x = (streak * (torch.arange(64) - 32)).sum((1, 2))
    angles = torch.rad2deg(torch.atan2(y, x))
    assert angles.abs().max() < 47
    assert float(angles.std()) == pytest.approx(90 / math.sqrt(12), rel=0.1)


def test_glass_keeps_colours_and_moves_them_a_little() -> None:
    ramp = torch.linspace(0, 1, 64).expand(4, 3, 64, 64)
    moved = made("glass_blur", 5, ramp)
    assert float((moved - ramp).mean()) == pytest.approx(0, abs=0.003)
    assert (moved - ramp).abs().max() <= (length(6.9, ramp, 0.5) + 1) / 63 + STEP
    assert torch.equal(made("glass_blur", 5, flat(0.2)), flat(0.2))


def theirs_zoomed(picture: np.ndarray, factor: float) -> np.ndarray:
    side = len(picture)
    inner = math.ceil(side / factor)
    start = (side - inner) // 2
    large = ndimage.zoom(picture[start : start + inner, start : start + inner], factor, order=1)
    left = (len(large) - side) // 2
    return large[left : left + side, left : left + side]


@pytest.mark.parametrize("factor", [1.1, 1.37, 3.0])
def test_the_zoom_is_scipys(factor: float) -> None:
    picture = photographs(64)[:1, :1]
    assert np.abs(zoomed(picture, factor)[0, 0].numpy() - theirs_zoomed(picture[0, 0].numpy(), factor)).max() < 1e-4


@pytest.mark.parametrize(("severity", "factors"), [(1, np.arange(1, 1.11, 0.01)), (5, np.arange(1, 1.31, 0.03))])
def test_zoom_blur_averages_the_image_and_its_zooms(severity: int, factors: np.ndarray) -> None:
    picture = photographs(64)[:1]
    channel = picture[0, 1].numpy()
    mean = (channel + sum(theirs_zoomed(channel, factor) for factor in factors)) / (len(factors) + 1)
    assert np.abs(made("zoom_blur", severity, picture)[0, 1].numpy() - mean).max() < 0.52 * STEP


# ---- weather -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "added"), [(1, 0.1), (3, 0.3), (5, 0.5)])
def test_brightness_is_hsvs_value(severity: int, added: float) -> None:
    pixels = photographs(32)
    hsv = color.rgb2hsv(pixels.permute(0, 2, 3, 1).numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + added, 0, 1)
    theirs = torch.from_numpy(color.hsv2rgb(hsv)).permute(0, 3, 1, 2)
    assert (made("brightness", severity, pixels) - theirs).abs().max() < 0.51 * STEP
    grey = flat(0.4, channels=1)
    assert made("brightness", severity, grey).mean() == pytest.approx(min(1, 0.4 + added), abs=STEP)


def test_fog_is_the_formula() -> None:
    pixels = flat(0.6)
    pixels[:, :, 0, 0] = 0.8  # the largest
    clouds = plasma(uniform(torch.arange(20), 64 * 64, (0, 1000 + ALL.index("fog"))), 1.4)
    expected = (pixels + 3 * clouds) * 0.8 / 3.8
    assert (made("fog", 5, pixels) - expected).abs().max() < 0.51 * STEP


def test_clouds_are_rougher_where_they_decay_less() -> None:
    numbers = uniform(torch.arange(8), 64 * 64, (0, 0))
    roughness = []
    for decay in (2.0, 1.7, 1.4):
        clouds = plasma(numbers, decay)
        assert clouds.shape == (8, 1, 64, 64)
        assert (clouds.amin((1, 2, 3)) == 0).all()
        assert (clouds.amax((1, 2, 3)) == 1).all()
        assert (clouds[..., 0] - clouds[..., -1]).abs().mean() < 0.1  # a torus
        roughness.append(float(clouds.diff(dim=-1).abs().mean()))
    assert roughness == sorted(roughness)


@pytest.mark.parametrize("family", ["snow", "frost", "fog"])
def test_weather_is_white_and_uneven(family: str) -> None:
    pixels = flat(0.1, 8)
    pixels[..., 0, 0] = 1  # fog is scaled to what an image has at most
    on_black = made(family, 3, pixels)
    assert on_black.mean() > 0.25
    assert on_black.std((1, 2, 3)).min() > 0.04
    red, blue = on_black.mean((0, 2, 3))[[0, 2]]
    assert 0 <= blue - red < 0.15


def test_water_brightens_and_mud_darkens() -> None:
    grey = flat(0.5)
    for severity in (1, 2, 3):
        assert (made("spatter", severity, grey) >= grey - STEP).all()
    for severity in (4, 5):
        mud = made("spatter", severity, grey)
        assert (mud <= grey + STEP).all()
        hit = (mud[:, 0] - grey[:, 0]).abs() > 0.1
        assert 0.05 < float(hit.float().mean()) < 0.5
        shades = mud.permute(0, 2, 3, 1)[hit].mean(0)
        assert shades[0] > shades[1] > shades[2]  # brown


# ---- digital -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("severity", "factor"), [(1, 0.4), (5, 0.05)])
def test_contrast_is_the_formula(severity: int, factor: float) -> None:
    pixels = photographs(32)
    mean = pixels.double().mean((2, 3), keepdim=True)
    assert (made("contrast", severity, pixels) - (factor * pixels + (1 - factor) * mean)).abs().max() < 0.51 * STEP


@pytest.mark.parametrize(("severity", "factor", "offset"), [(1, 0.3, 0), (3, 2, 0), (4, 5, 0.1), (5, 20, 0.2)])
def test_saturation_is_hsvs(severity: int, factor: float, offset: float) -> None:
    pixels = photographs(32)
    hsv = color.rgb2hsv(pixels.permute(0, 2, 3, 1).numpy())
    hsv[..., 1] = np.clip(factor * hsv[..., 1] + offset, 0, 1)
    theirs = torch.from_numpy(color.hsv2rgb(hsv)).permute(0, 3, 1, 2)
    assert (made("saturate", severity, pixels) - theirs).abs().max() < 0.52 * STEP


@pytest.mark.parametrize(("severity", "share"), [(1, 0.6), (2, 0.5), (5, 0.25)])
@pytest.mark.parametrize("side", [32, 50, 64])
def test_pixelate_is_pillows(severity: int, share: float, side: int) -> None:
    pixels = photographs(side)
    for picture, ours in zip(pixels, made("pixelate", severity, pixels), strict=True):
        image = Image.fromarray((picture * 255).byte().permute(1, 2, 0).numpy())
        small = image.resize((int(side * share),) * 2, Image.Resampling.BOX)
        theirs = torch.from_numpy(np.array(small.resize((side, side), Image.Resampling.BOX))).permute(2, 0, 1) / 255
        assert (ours - theirs).abs().max() < 1.01 * STEP  # Pillow rounds between its two passes


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (5, 7)])
def test_jpeg_is_pillows(severity: int, quality: int, channels: int) -> None:
    pixels = photographs(64)[:, :channels]
    for picture, ours in zip(pixels, made("jpeg_compression", severity, pixels), strict=True):
        array = (picture * 255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(array.squeeze()).save(file, "JPEG", quality=quality)
        theirs = torch.from_numpy(np.array(Image.open(file))).view(64, 64, channels).permute(2, 0, 1) / 255
        assert torch.equal(ours, theirs)


def test_elastic_places_have_the_deviation_asked_for() -> None:
    pixels = photographs(64)
    for severity, deviation in ((3, 0.815), (5, 1.95)):
        places = elastic_places(pixels, severity, lambda n: uniform(torch.arange(6), n, (0, 0)))
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        design = torch.stack((x, y, torch.ones_like(x)), -1).view(1, -1, 3).expand(6, -1, -1)
        fitted = torch.linalg.lstsq(design, places.view(6, -1, 2)).solution
        rest = places.view(6, -1, 2) - design @ fitted
        assert float(rest.std()) == pytest.approx(length(deviation, pixels, 0.3), rel=0.15)

"""Each corruption against its definition, on real photographs and on images that show one thing."""

from __future__ import annotations

import colorsys
import io
import math
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy import ndimage
from scipy.stats import poisson
from sklearn.datasets import load_sample_images

from btrain.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS, corrupt
from btrain.corruptions.blur import smear
from btrain.corruptions.frost import photographs, synthesised
from btrain.corruptions.plasma import plasma
from btrain.errors import UserError

Images = npt.NDArray[np.uint8]
ALL = CORRUPTIONS + EXTRA_CORRUPTIONS
DETERMINISTIC = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate",
                 "jpeg_compression", "gaussian_blur", "saturate"}  # fmt: skip


@pytest.fixture(scope="module")
def tiles() -> Images:
    """100 tiles of 32×32 from two photographs at half their size, (100, 32, 32, 3)."""
    found = []
    for photograph in load_sample_images().images:
        small = Image.fromarray(photograph).resize((320, 192), Image.Resampling.BOX)
        pixels = np.asarray(small).reshape(6, 32, 10, 32, 3).swapaxes(1, 2)
        found.append(pixels.reshape(60, 32, 32, 3)[:50])
    return np.concatenate(found)


def flat(level: int, n: int = 200, channels: int = 3) -> Images:
    return np.full((n, 32, 32, channels), level, dtype=np.uint8)


def run(images: Images, name: str, severity: int, seed: int = 0, **kwargs: Any) -> Images:
    return corrupt(images, name, severity, np.random.default_rng(seed), **kwargs)


def truncated(levels: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    return np.floor(np.clip(levels, 0, 255)).astype(int)


def assert_close(found: Images, expected: npt.NDArray[Any], *, differing: float = 0.06) -> None:
    """Equal but for the last bit of floating point, which truncation makes a level."""
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() <= differing


# All of them


@pytest.mark.parametrize("size", [(32, 32, 3), (28, 20, 1), (8, 8, 1), (48, 40, 3)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_corruption_keeps_shape_type_and_its_input(
    tiles: Images, name: str, size: tuple[int, int, int]
) -> None:
    height, width, channels = size
    images = np.concatenate([tiles, tiles], axis=1).repeat(2, axis=2)
    images = images[:6, :height, :width, :channels].copy()
    before = images.copy()
    for severity in range(1, 6):
        once = run(images, name, severity)
        assert once.shape == images.shape
        assert once.dtype == np.uint8
        assert (once == run(images, name, severity)).all()
    assert (images == before).all()
    grey_stays = name == "saturate" and channels == 1
    assert (once == images).all() == grey_stays
    # Other draws, other pixels.
    assert (once == run(images, name, 5, seed=1)).all() == (name in DETERMINISTIC)


ORDERED = [name for name in ALL if name not in
           ("glass_blur", "frost", "elastic_transform", "spatter", "saturate")]  # fmt: skip


def psnr(images: Images, corrupted: Images) -> float:
    return float(10 * np.log10(255**2 / np.mean((images.astype(float) - corrupted) ** 2)))


@pytest.mark.parametrize("name", ORDERED)
def test_a_higher_severity_is_farther_from_the_image(tiles: Images, name: str) -> None:
    distances = [psnr(tiles, run(tiles, name, severity)) for severity in range(1, 6)]
    # Severities 3 and 4 of motion blur differ in the radius alone, where little weight is left.
    slack = 0.15 if name == "motion_blur" else 0
    assert all(a > b - slack for a, b in pairwise(distances)), distances


@pytest.mark.parametrize(
    ("name", "weaker", "stronger"),
    [
        ("glass_blur", 2, 4),  # the same Gaussian, two rounds
        ("glass_blur", 3, 5),
        ("frost", 1, 2),  # the same share of the image
        ("spatter", 1, 2),  # water
        ("spatter", 2, 3),
        ("spatter", 4, 5),  # mud
        ("saturate", 1, 2),  # less saturation
        ("saturate", 3, 4),  # more
        ("saturate", 4, 5),
    ],
)
def test_where_the_constants_are_ordered_so_is_the_distance(
    tiles: Images, name: str, weaker: int, stronger: int
) -> None:
    assert psnr(tiles, run(tiles, name, weaker)) > psnr(tiles, run(tiles, name, stronger))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "rain"}, ["rain", "gaussian_noise", "saturate"]),
        ({"severity": 0}, ["severity", "1 to 5", "0"]),
        ({"severity": 6}, ["severity", "1 to 5", "6"]),
        ({"images": np.zeros((2, 32, 32, 3), np.float32)}, ["uint8", "float32"]),
        ({"images": np.zeros((2, 3, 32, 32), np.uint8)}, ["(2, 3, 32, 32)"]),
        ({"images": np.zeros((2, 7, 32, 3), np.uint8)}, ["8×8", "(2, 7, 32, 3)"]),
        ({"images": np.zeros((32, 32, 3), np.uint8)}, ["(n, H, W, 1 or 3)"]),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: list[str]) -> None:
    arguments: dict[str, Any] = {"images": flat(0, 1), "name": "fog", "severity": 1} | change
    with pytest.raises(UserError) as error:
        run(**arguments)
    assert all(word in str(error.value) for word in words), error.value


# Noise

GREY = 128
X = GREY / 255
SEVERITIES = range(5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_noise_has_its_deviation_and_truncates(severity: int) -> None:
    noise = run(flat(GREY), "gaussian_noise", severity + 1).astype(float) - GREY
    deviation = [0.04, 0.06, 0.08, 0.09, 0.10][severity]
    assert noise.std() == pytest.approx(255 * deviation, rel=0.01)
    assert noise.mean() == pytest.approx(-0.5, abs=0.1)  # rounding would give 0
    channels = noise.reshape(-1, 3).T
    assert abs(np.corrcoef(channels)[0, 1:]).max() < 0.01


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_counts_photons(severity: int) -> None:
    photons = [500, 250, 100, 75, 50][severity]
    levels = run(flat(GREY), "shot_noise", severity + 1)
    counts = np.arange(2 * photons)
    possible, likely = truncated(counts / photons * 255), poisson.pmf(counts, X * photons)
    assert set(np.unique(levels)) <= set(possible)
    mean = likely @ possible
    assert levels.mean() == pytest.approx(mean, abs=0.1)
    assert levels.var() == pytest.approx(likely @ (possible - mean) ** 2, rel=0.01)
    # Truncated steps of 255 / c aside, the variance is x / c.
    assert levels.std() == pytest.approx(255 * math.sqrt(X / photons), rel=0.03)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_speckle_noise_grows_with_the_level(severity: int) -> None:
    deviation = [0.06, 0.10, 0.12, 0.16, 0.20][severity]
    for level in (40, 120):
        noise = run(flat(level), "speckle_noise", severity + 1).astype(float)
        assert noise.std() == pytest.approx(deviation * level, rel=0.01)
    assert (run(flat(0), "speckle_noise", severity + 1) == 0).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_is_salt_and_pepper_in_equal_parts(severity: int) -> None:
    share = [0.01, 0.02, 0.03, 0.05, 0.07][severity]
    levels = run(flat(GREY), "impulse_noise", severity + 1)
    for level in (0, 255):
        assert (levels == level).mean() == pytest.approx(share / 2, rel=0.05)
    assert set(np.unique(levels)) == {0, GREY, 255}


# Blurs


def white_pixel() -> Images:
    image = flat(0, 1)
    image[0, 16, 16] = 255
    return image


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_spreads_a_pixel_as_a_gaussian(severity: int) -> None:
    deviation = [0.4, 0.6, 0.7, 0.8, 1.0][severity]
    line = np.exp(-0.5 * ((np.arange(32) - 16) / deviation) ** 2)
    line /= line.sum()
    expected = truncated(255 * np.outer(line, line))
    assert_close(run(white_pixel(), "gaussian_blur", severity + 1)[0, ..., 0], expected)


@pytest.mark.parametrize(
    ("severity", "rows"),
    [
        # A single pixel, smoothed by (e, 1, e) both ways, e = exp(-1 / 2σ²).
        (1, [[1, 9, 1], [9, 215, 9], [1, 9, 1]]),
        # A plus of five pixels of a fifth each, then nine pixels of a ninth, hardly smoothed.
        (4, [[0, 51, 0], [51, 51, 51], [0, 51, 0]]),
        (5, [[28, 28, 28], [28, 28, 28], [28, 28, 28]]),
    ],
)
def test_defocus_blur_spreads_a_pixel_as_a_disk(severity: int, rows: list[list[int]]) -> None:
    blurred = run(white_pixel(), "defocus_blur", severity)[0, ..., 0].astype(int)
    assert np.abs(blurred[15:18, 15:18] - rows).max() <= 1
    blurred[15:18, 15:18] = 0
    assert blurred.max() <= 1


def test_defocus_blur_mirrors_at_the_last_pixel() -> None:
    image = flat(0, 1)
    image[0, 1] = 255  # a bright second row is above the first as well as below it
    blurred = run(image, "defocus_blur", 5)[0, :, 16, 0].astype(int)
    assert np.abs(blurred[:4] - [170, 85, 85, 0]).max() <= 1


@pytest.mark.parametrize("severity", [1, 4])
def test_glass_blur_takes_each_pixel_from_above_or_left(severity: int) -> None:
    """The image's channels are its rows and columns, so that every pixel says where it is from."""
    rows, columns = np.mgrid[:32, :32] * 8
    image = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    shaken = run(np.stack([image] * 100), "glass_blur", 1).astype(int)
    offset = (image - shaken)[..., :2] // 8
    assert (offset[:, :2] == 0).all()
    assert (offset[:, :, :2] == 0).all()
    choices, counts = np.unique(offset[:, 2:, 2:].reshape(-1, 2), axis=0, return_counts=True)
    assert choices.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert counts / counts.sum() == pytest.approx(0.25, abs=0.01)


def smeared_by_hand(image: Images, angle: float, radius: int, deviation: float) -> Any:
    """Pixel by pixel, without leaving out a tap."""
    weights = [math.exp(-(i**2) / (2 * deviation**2)) for i in range(2 * radius + 1)]
    total = np.zeros(image.shape)
    height, width = image.shape[:2]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    for row in range(height):
        for column in range(width):
            for i, weight in enumerate(weights):
                y = min(max(row + math.ceil(i * sin - 0.5), 0), height - 1)
                x = min(max(column + math.ceil(i * cos - 0.5), 0), width - 1)
                total[row, column] += weight * image[y, x]
    return np.rint(total / sum(weights))


@pytest.mark.parametrize(("radius", "deviation"), [(6, 1), (8, 2), (14, 12)])
def test_motion_blur_is_half_a_gaussian_along_a_line(
    tiles: Images, radius: int, deviation: float
) -> None:
    images, angles = tiles[:4, :16, :16], np.array([0.0, 31.7, -45, -120])
    smeared = smear(images, angles, radius=radius, deviation=deviation)
    for image, angle, result in zip(images, angles, smeared, strict=True):
        assert_close(result, smeared_by_hand(image, angle, radius, deviation), differing=0.001)


def test_motion_blur_is_within_45_degrees_of_the_horizontal() -> None:
    trails = run(white_pixel().repeat(300, axis=0), "motion_blur", 5)[..., 0] > 0
    _, rows, columns = trails.nonzero()
    left, up = 16 - columns, 16 - rows
    assert left.min() == 0  # one-sided
    assert (abs(up) <= left).all()
    assert (up > 4).any()
    assert (up < -4).any()


@pytest.mark.parametrize(("severity", "factors"), [(0, 7), (1, 12), (2, 16), (3, 21), (4, 26)])
def test_zoom_blur_is_the_mean_over_its_zooms(tiles: Images, severity: int, factors: int) -> None:
    zooms = np.arange(1, [1.06, 1.11, 1.16, 1.21, 1.26][severity], 0.01)
    assert len(zooms) == factors
    expected = []
    for image in tiles[:10] / 255:
        total = image.copy()
        for zoom in zooms:
            crop = math.ceil(32 / zoom)
            start = (32 - crop) // 2
            part = image[start : start + crop, start : start + crop]
            larger = ndimage.zoom(part, (zoom, zoom, 1), order=1)
            trim = (len(larger) - 32) // 2
            total += larger[trim : trim + 32, trim : trim + 32]
        expected.append(total / (factors + 1) * 255)
    assert_close(run(tiles[:10], "zoom_blur", severity + 1), truncated(np.stack(expected)))


# Weather


def test_snow_whitens_and_falls_the_same_upside_down() -> None:
    black = run(flat(0), "snow", 1)
    assert (black == black[:, ::-1, ::-1]).all()
    assert (black == black[..., :1]).all()
    # 5 % of a half, and twice what of N(0.1, 0.2²) is above 0.6.
    whitening = int(255 * 0.05 * 0.5)
    assert black.min() == whitening
    above = NormalDist(0.1, 0.2)
    expected = 0.1 * (1 - above.cdf(0.6)) + 0.2**2 * above.pdf(0.6)
    assert black.mean() - whitening == pytest.approx(2 * 255 * expected, rel=0.1)


def test_snow_falls_within_45_degrees_of_the_vertical() -> None:
    flakes = run(flat(0), "snow", 1)[..., 0].astype(float)
    flakes -= flakes.mean()
    along, across = (np.mean(flakes * np.roll(flakes, 2, axis)) for axis in (1, 2))
    assert along > 4 * abs(across)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_a_weighted_sum(tiles: Images, severity: int) -> None:
    image_share, frost_share = [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)][severity]
    ice = np.broadcast_to(np.array([90, 150, 210], dtype=np.uint8), (40, 50, 3))
    expected = truncated(image_share * tiles + frost_share * np.array([90, 150, 210]))
    assert_close(run(tiles, "frost", severity + 1, photographs=(ice,)), expected)
    grey = run(tiles[..., :1], "frost", severity + 1, photographs=(ice,))
    luma = 0.299 * 90 + 0.587 * 150 + 0.114 * 210
    assert_close(grey, truncated(image_share * tiles[..., :1] + frost_share * luma))


def test_frost_takes_every_crop_of_every_photograph() -> None:
    rows, columns = np.mgrid[:36, :40] * 5
    ice = np.stack([rows + 2, columns + 2, 0 * rows], axis=-1).astype(np.uint8)
    crops = run(flat(0, 1000), "frost", 1, photographs=(ice, ice + 1)).astype(int)  # a fifth
    assert (np.diff(crops[..., 0], axis=1) == 1).all()
    assert (np.diff(crops[..., 1], axis=2) == 1).all()
    corners = set(map(tuple, crops[:, 0, 0, :2]))
    assert corners == {(top, left) for top in range(5) for left in range(9)}


def test_photographs_are_shrunk_to_a_fifth_for_32_pixels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(200, 300, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "b.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("mine")
    grey, colour = photographs(tmp_path, 32, 32)
    assert (colour == pixels[2::5, 2::5]).all()
    assert (grey == pixels[2::5, 2::5, :1]).all()
    (larger, _) = photographs(tmp_path, 64, 64)
    assert larger.shape == (80, 120, 3)


@pytest.mark.parametrize("count", [1, 5, 6, 7])
def test_of_six_photographs_the_sixth_is_never_drawn(tmp_path: Path, count: int) -> None:
    """The original has frost1 to frost6 and draws one of the first five."""
    for i in range(1, count + 1):
        suffix = "png" if i < 4 else "jpg"
        Image.new("L", (160, 160), 10 * i).save(tmp_path / f"frost{i}.{suffix}")
    (tmp_path / "._frost1.png").write_bytes(b"no image")
    taken = [round(int(frost.max()) / 10) for frost in photographs(tmp_path, 32, 32)]
    assert taken == [*range(1, 6 if count == 6 else count + 1)]


@pytest.mark.parametrize("kind", ["absent", "empty", "small", "damaged"])
def test_a_folder_without_frost_is_named(tmp_path: Path, kind: str) -> None:
    folder, words = tmp_path / "ice", ["ice"]
    if kind != "absent":
        folder.mkdir()
    if kind == "small":
        Image.new("RGB", (157, 300)).save(folder / "a.png")
        words = ["a.png", "too small", "160×160"]
    if kind == "damaged":
        (folder / "a.jpg").write_bytes(b"\xff\xd8 no image")
        words = ["a.jpg"]
    with pytest.raises(UserError) as error:
        photographs(folder, 32, 32)
    assert all(word in str(error.value) for word in words), error.value


def test_synthesised_frost_is_pale_blue_and_rough() -> None:
    for texture in synthesised(32, 32):
        assert texture.shape == (128, 128, 3)
        red, green, blue = texture.mean(axis=(0, 1))
        assert 130 < red < green < blue < 190
        assert 15 < texture.mean(axis=2).std() < 45
        assert np.abs(np.diff(texture.mean(axis=2), axis=1)).mean() > 5
    assert synthesised(32, 20)[0].shape == (128, 128, 3)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_reaches_from_no_cloud_to_a_full_one(severity: int) -> None:
    amount = [0.2, 0.5, 0.75, 1, 1.5][severity]
    foggy = run(flat(GREY), "fog", severity + 1)
    assert (foggy == foggy[..., :1]).all()
    darkest, brightest = foggy.min(axis=(1, 2, 3)), foggy.max(axis=(1, 2, 3))
    assert_close(darkest, truncated(np.array(255 * X * X / (X + amount))))
    assert_close(brightest, np.full(len(foggy), GREY), differing=1)


@pytest.mark.parametrize("decay", [3, 2, 1.75])
def test_plasma_displaces_midpoints_less_at_every_scale(decay: float) -> None:
    clouds = plasma(500, 32, decay, np.random.default_rng(0))
    assert clouds.min(axis=(1, 2)) == pytest.approx(0)
    assert clouds.max(axis=(1, 2)) == pytest.approx(1)

    def displacement(step: int) -> Any:
        """Of the middles of squares of so many pixels, from the mean of the corners."""
        corners = clouds[:, ::step, ::step]
        sums = sum(np.roll(corners, (-i, -j), (1, 2)) for i in (0, 1) for j in (0, 1))
        middles = clouds[:, step // 2 :: step, step // 2 :: step] - sums / 4
        return np.sqrt((middles**2).mean(axis=(1, 2)))

    # The width of the displacement is squared, w·U(-w, w).
    assert np.median(displacement(4) / displacement(2)) == pytest.approx(decay**2, rel=0.05)


def by_hsv(images: Images, change: Any) -> Any:
    pixels = [
        colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*pixel)))
        for pixel in images.reshape(-1, 3) / 255
    ]
    return truncated(255 * np.array(pixels).reshape(images.shape))


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_raises_the_value(tiles: Images, severity: int) -> None:
    amount = [0.05, 0.1, 0.15, 0.2, 0.3][severity]
    images = np.concatenate([tiles[::20], flat(0, 1), flat(250, 1)])
    expected = by_hsv(images, lambda h, s, v: (h, s, min(v + amount, 1)))
    assert_close(run(images, "brightness", severity + 1), expected)
    grey = run(images[..., :1], "brightness", severity + 1)
    assert_close(grey, truncated(images[..., :1] + 255 * amount))


def test_brightness_truncates() -> None:
    assert (run(flat(100), "brightness", 1) == 112).all()  # 112.75


# Digital


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_draws_towards_the_channel_mean(tiles: Images, severity: int) -> None:
    kept = [0.75, 0.5, 0.4, 0.3, 0.15][severity]
    expected = np.stack([[kept * channel + (1 - kept) * channel.mean() for channel in image]
                         for image in tiles.transpose(0, 3, 1, 2)])  # fmt: skip
    contrasted = run(tiles, "contrast", severity + 1)
    assert_close(contrasted, truncated(expected).transpose(0, 2, 3, 1))


def test_contrast_truncates() -> None:
    image = flat(0, 1)
    image[:, :16] = 255
    assert set(np.unique(run(image, "contrast", 1))) == {31, 223}  # 31.875 and 223.125


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturate_changes_the_saturation(tiles: Images, severity: int) -> None:
    factor, amount = [(0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)][severity]
    images = np.concatenate([tiles[::20], flat(0, 1), flat(201, 1)])  # grey counts as red
    expected = by_hsv(images, lambda h, s, v: (h, min(s * factor + amount, 1), v))
    assert_close(run(images, "saturate", severity + 1), expected)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_averages_whole_pixels_and_repeats_them(tiles: Images, severity: int) -> None:
    side = [30, 28, 27, 24, 20][severity]
    owner = ((np.arange(32) + 0.5) * side / 32).astype(int)  # of each pixel, both ways
    mean = (owner == np.arange(side)[:, None]) / np.bincount(owner)[:, None]
    small = np.floor(tiles.transpose(0, 1, 3, 2) @ mean.T + 0.5)  # rows first, each pass rounded
    small = np.floor(small.transpose(0, 2, 3, 1) @ mean.T + 0.5).transpose(0, 3, 2, 1)
    expected = small[:, owner][:, :, owner]
    assert_close(run(tiles, "pixelate", severity + 1), expected, differing=0.001)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_compression_is_a_file_of_its_quality(tiles: Images, severity: int) -> None:
    compressed = run(tiles, "jpeg_compression", severity + 1)
    for image, result in zip(tiles[:5], compressed, strict=False):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=[80, 65, 58, 50, 40][severity])
        assert (np.asarray(Image.open(file)) == result).all()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_is_an_affine_map_and_smooth_shifts(tiles: Images, severity: int) -> None:
    """The same draws, put through an equation solver and scipy's interpolation."""
    jitter = 32 * [0.08, 0.07, 0.06, 0.05, 0.03][severity]
    amplitude = 32 * [0, 0.05, 0.08, 0.1, 0.1][severity]
    deviation = 32 * [0, 0.2, 0.06, 0.04, 0.03][severity]
    rng = np.random.default_rng(0)
    corners = np.array([[26, 26], [26, 6], [6, 6]])
    moved = corners + rng.uniform(-jitter, jitter, size=(10, 3, 2))
    shifts = rng.uniform(-1, 1, size=(2, 10, 32, 32))
    rows, columns = np.mgrid[:32, :32].astype(float)
    results = run(tiles[:10], "elastic_transform", severity + 1)
    expected = np.empty(results.shape)
    for i, image in enumerate(tiles[:10]):
        back = np.linalg.solve(np.column_stack([moved[i], np.ones(3)]), corners)  # (3, 2)
        x, y = (back[0, k] * columns + back[1, k] * rows + back[2, k] for k in (0, 1))
        right, down = (
            amplitude
            * ndimage.gaussian_filter(
                shifts[k, i], max(deviation, 1e-9), mode="reflect", truncate=3
            )
            for k in (0, 1)
        )
        for channel in range(3):
            warped = ndimage.map_coordinates(
                image[..., channel] / 255, [y, x], order=1, mode="mirror"
            )
            places = [rows + down, columns + right]
            result = ndimage.map_coordinates(warped, places, order=1, mode="reflect")
            expected[i, ..., channel] = 255 * result
    assert_close(results, truncated(expected))


# Spatter


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_water_is_pale_turquoise_light(tiles: Images, severity: int) -> None:
    drops = run(flat(0, 100), "spatter", severity).astype(int)
    wet = drops[..., 1].max(axis=(1, 2)) > 0
    assert wet.mean() > 0.9
    assert (drops[wet].max(axis=(1, 2)) == [87, 119, 119]).all()  # half of (175, 238, 238)
    assert np.abs(drops[..., 0] - drops[..., 1] * 175 / 238).max() <= 1.5
    assert (drops[..., 1] > 0).mean() < 0.3
    assert (run(tiles, "spatter", severity) >= tiles).all()


@pytest.mark.parametrize("severity", [4, 5])
def test_mud_is_brown_and_opaque(severity: int) -> None:
    splashes = run(flat(255, 100), "spatter", severity)
    brown = splashes[(splashes < 255).any(axis=-1)]
    assert 0.005 < len(brown) / splashes[..., 0].size < 0.3
    # At least four fifths of (63, 42, 20), the rest white.
    assert (brown >= (63, 42, 20)).all()
    assert (brown <= (102, 85, 67)).all()
    assert (brown.min(axis=0) <= (64, 43, 21)).all()

"""Every AugMix operation against Pillow, and the draws against their distributions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from btrain.attacks import views as ops
from btrain.attacks.views import DEFAULT_OPERATIONS, GEOMETRIC, INTENSITY, OPERATIONS, Draws, augmix
from btrain.data import Data


def draw(
    m: int,
    seed: int,
    *,
    width: int = 3,
    lengths: tuple[int, int] = (1, 3),
    kinds: int = DEFAULT_OPERATIONS,
) -> Draws:
    generator = torch.Generator().manual_seed(seed)
    return ops.draw(m, generator=generator, severity=3, width=width, lengths=lengths, kinds=kinds)


def to_pil(image: Tensor) -> Image.Image:
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array if array.shape[2] == 3 else array[..., 0])


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Real 32×32 crops, then a black, a white and a constant grey image. (64, 3, 32, 32) uint8"""
    pictures = [torch.tensor(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")]
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(390, (61, 2), generator=generator).tolist()
    crops = [pictures[i % 2][y : y + 32, x : x + 32] for i, (y, x) in enumerate(corners)]
    constant = [torch.full((32, 32, 3), level, dtype=torch.uint8) for level in (0, 255, 77)]
    return torch.stack([*crops, *constant]).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(params=["rgb", "grey", "wide", "digits"])
def images(request: pytest.FixtureRequest, photos: Tensor, digits: Data) -> Tensor:
    return {
        "rgb": photos,
        "grey": photos[:, :1].contiguous(),
        "wide": photos[:, :, 3:20].contiguous(),
        "digits": digits.train.images[:64],
    }[request.param]


def enhance(kind: Any) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, u: kind(image).enhance(abs(u) * 0.18 + 0.1)


def transform(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
    )


PILLOW: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "rotate": lambda image, u: image.rotate(int(u * 3), resample=Image.Resampling.BILINEAR),
    "shear_x": lambda image, u: transform(image, 1, u * 0.03, 0, 0, 1, 0),
    "shear_y": lambda image, u: transform(image, 1, 0, 0, u * 0.03, 1, 0),
    "translate_x": lambda im, u: transform(im, 1, 0, int(u * (im.width / 3) / 10), 0, 1, 0),
    "translate_y": lambda im, u: transform(im, 1, 0, 0, 0, 1, int(u * (im.height / 3) / 10)),
    "autocontrast": lambda image, u: ImageOps.autocontrast(image),
    "equalize": lambda image, u: ImageOps.equalize(image),
    "posterize": lambda image, u: ImageOps.posterize(image, 4 - int(abs(u) * 4 / 10)),
    "solarize": lambda image, u: ImageOps.solarize(image, 256 - int(abs(u) * 25.6)),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "brightness": enhance(ImageEnhance.Brightness),
    "sharpness": enhance(ImageEnhance.Sharpness),
}


def each(images: Tensor, reference: Callable[..., Image.Image], *parameters: Tensor) -> Tensor:
    """`reference` of each image with its own parameters."""
    rows = zip(images, *(parameter.tolist() for parameter in parameters), strict=True)
    return torch.stack([from_pil(reference(to_pil(image), *row)) for image, *row in rows])


def signed_levels(n: int, largest: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    u = 0.1 + (largest - 0.1) * torch.rand(n, generator=generator, dtype=torch.float64)
    return u * torch.tensor([1, -1]).repeat(n)[:n]


def test_the_operations_have_their_reference() -> None:
    assert tuple(PILLOW) == OPERATIONS
    assert OPERATIONS[DEFAULT_OPERATIONS:] == ("color", "contrast", "brightness", "sharpness")


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_pillows(images: Tensor, name: str) -> None:
    levels = signed_levels(len(images), 9.9)
    if name in GEOMETRIC:
        index = torch.full((len(images),), OPERATIONS.index(name))
        matrix = ops.affine_matrix(index, levels, images.shape[3], images.shape[2])
        result = ops.affine(images, matrix)
    else:
        result = INTENSITY[name](images, levels.abs())
    assert result.dtype == torch.uint8
    assert torch.equal(result, each(images, PILLOW[name], levels))


def test_an_affine_map_is_pillows(images: Tensor) -> None:
    generator = torch.Generator().manual_seed(2)
    random = torch.randn(len(images), 6, dtype=torch.float64, generator=generator)
    matrix = torch.tensor([1, 0, 0, 0, 1, 0]) + random * torch.tensor([0.4, 0.4, 4, 0.4, 0.4, 4])
    expected = each(images, transform, *matrix.unbind(1))
    assert torch.equal(ops.affine(images, matrix), expected)


def test_all_bits_and_thresholds_are_pillows(photos: Tensor) -> None:
    bits = 1 + torch.arange(len(photos)) % 8
    assert torch.equal(ops.posterize(photos, bits), each(photos, ImageOps.posterize, bits))
    thresholds = 256 * torch.arange(len(photos)) // (len(photos) - 1)  # 0 … 256
    assert torch.equal(
        ops.solarize(photos, thresholds), each(photos, ImageOps.solarize, thresholds)
    )


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_enhancers_are_pillows_beyond_the_image(images: Tensor, name: str) -> None:
    factors = torch.linspace(0, 3, len(images))  # above 1 they extrapolate and clip
    factors[1] = 1
    kind = getattr(ImageEnhance, name.capitalize())
    expected = each(images, lambda image, factor: kind(image).enhance(factor), factors)
    result = getattr(ops, f"enhance_{name}")(images, factors)
    assert torch.equal(result, expected)
    assert torch.equal(result[1], images[1])


def test_every_range_of_levels_is_stretched_as_pillow_does() -> None:
    lows, highs = torch.triu_indices(256, 256)
    ramp = torch.arange(256).clamp(lows[::17, None], highs[::17, None])
    image = ramp.to(torch.uint8).view(-1, 1, 16, 16)
    assert torch.equal(ops.autocontrast(image), each(image, ImageOps.autocontrast))


def test_parameters_are_each_images_own(photos: Tensor) -> None:
    same = photos[:1].expand(4, -1, -1, -1).contiguous()
    u = torch.tensor([0.1, 1.0, 2.0, 2.9], dtype=torch.float64)
    for name in ("solarize", "color", "contrast", "brightness", "sharpness"):
        assert len(INTENSITY[name](same, u).unique(dim=0)) == 4
    for i in range(len(GEOMETRIC)):
        moved = ops.affine(same, ops.affine_matrix(torch.full((4,), i), u, 32, 32))
        assert len(moved.unique(dim=0)) >= 3  # 0.1 and 1.0 may both be less than a whole step


def pillow_chains(images: Tensor, draws: Draws) -> Tensor:
    """AugMix's chains as the original runs them, image after image."""
    results = []
    for image, operations, levels in zip(images, draws.operations, draws.levels, strict=True):
        for names, chain_levels in zip(operations.tolist(), levels.tolist(), strict=True):
            chain = to_pil(image)
            for index, u in zip(names, chain_levels, strict=True):
                if index < len(OPERATIONS):
                    chain = PILLOW[OPERATIONS[index]](chain, u)
            results.append(from_pil(chain))
    return torch.stack(results).view(len(images), -1, *images.shape[1:])


@pytest.mark.parametrize("kinds", [DEFAULT_OPERATIONS, len(OPERATIONS)])
def test_chains_are_pillows(images: Tensor, kinds: int) -> None:
    before = images.clone()
    for width in (3, 1):
        draws = draw(len(images), 3, width=width, kinds=kinds)
        chains = ops.run_chains(images, draws.operations, draws.levels)
        assert torch.equal(chains, pillow_chains(images, draws))
        assert torch.equal(images, before)


def test_a_view_mixes_the_chains_and_the_image(photos: Tensor) -> None:
    x = photos.float() / 255
    draws = draw(len(x), 4)
    weights = draws.weights.view(len(x), 3, 1, 1, 1)
    mixture = (weights * pillow_chains(photos, draws) / 255).sum(dim=1)
    share = draws.mixing.view(-1, 1, 1, 1)
    view = augmix(x, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(view, (1 - share) * x + share * mixture, rtol=0, atol=1e-6)
    assert (view * 255 - (view * 255).round()).abs().max() > 0.4  # the mixture is not quantised


def test_mixing_nothing_and_everything(photos: Tensor) -> None:
    x = photos.float() / 255
    draws = draw(len(x), 5, width=1)
    chains = ops.run_chains(photos, draws.operations, draws.levels)
    nothing = ops.mix(x, chains, draws._replace(mixing=torch.zeros(len(x))))
    everything = ops.mix(x, chains, draws._replace(mixing=torch.ones(len(x))))
    assert torch.equal(nothing, x)
    assert torch.equal(everything, chains[:, 0].float() / 255)


def test_views_stay_in_the_box_and_differ_from_their_images(images: Tensor) -> None:
    x = images.float() / 255
    view = augmix(x, generator=torch.Generator().manual_seed(6), severity=10, all_ops=True)
    assert view.shape == x.shape
    assert view.dtype == torch.float32
    assert view.min() >= 0
    assert view.max() <= 1
    differs = ((view - x).abs() > 1e-6).flatten(1).any(dim=1)
    assert differs.float().mean() > 0.9


def test_the_generator_alone_decides(photos: Tensor) -> None:
    x = photos.float() / 255

    def view(seed: int, **options: Any) -> Tensor:
        torch.seed()  # of the global generator, which has no say
        return augmix(x, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(view(0), view(0))
    assert torch.equal(view(0, depth=-1), view(0))
    assert not torch.equal(view(0), view(1))
    assert not torch.equal(view(0), view(0, all_ops=True))
    generator = torch.Generator().manual_seed(0)
    assert not torch.equal(augmix(x, generator=generator), augmix(x, generator=generator))


@pytest.mark.parametrize("m", [0, 1, 2])
def test_small_batches(photos: Tensor, m: int) -> None:
    x = photos[:m].float() / 255
    view = augmix(x, generator=torch.Generator().manual_seed(0), width=2, depth=4)
    assert view.shape == x.shape


def test_operations_levels_and_lengths_are_uniform() -> None:
    draws = draw(20_000, 7)
    drawn = draws.operations < len(OPERATIONS)
    lengths = drawn.sum(dim=2)
    assert torch.equal(drawn, torch.arange(3) < lengths[..., None])  # a chain ends once
    assert_shares(lengths.flatten(), [0, 1 / 3, 1 / 3, 1 / 3])
    assert_shares(draws.operations[drawn], [1 / 9] * 9)
    assert (draws.levels > 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert_uniform((draws.levels.abs() - 0.1) / 2.9)

    fixed = draw(2000, 7, width=2, lengths=(4, 4), kinds=len(OPERATIONS))
    assert fixed.operations.shape == fixed.levels.shape == (2000, 2, 4)
    assert_shares(fixed.operations.flatten(), [1 / 13] * 13)


def test_weights_are_dirichlet_and_mixing_is_uniform() -> None:
    draws = draw(20_000, 8)
    torch.testing.assert_close(draws.weights.sum(dim=1), torch.ones(20_000))
    torch.testing.assert_close(
        draws.weights.mean(dim=0), torch.full((3,), 1 / 3), rtol=0, atol=0.01
    )
    covariance = (torch.eye(3) - 1 / 3) / 3 / 4  # of Dirichlet(1, 1, 1)
    torch.testing.assert_close(torch.cov(draws.weights.T), covariance, rtol=0, atol=0.002)
    assert_uniform(1 - (1 - draws.weights) ** 2)  # each weight is Beta(1, 2)
    assert_uniform(draws.mixing)


def assert_shares(values: Tensor, expected: list[float]) -> None:
    shares = values.bincount(minlength=len(expected)) / len(values)
    torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.01)


def assert_uniform(values: Tensor) -> None:
    """On [0, 1], by the distance of Kolmogorov and Smirnov."""
    ordered = values.flatten().sort().values
    assert (ordered - torch.linspace(0, 1, len(ordered))).abs().max() < 0.015


class Synchronising(TorchDispatchMode):
    """Fails on operations that wait for a GPU because values decide a size or go to the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.startswith(("index", "_index_put")) else []
        masks = [i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool]
        assert not masks
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "bincount")
        return func(*args, **(kwargs or {}))


def test_only_the_counts_are_copied_to_the_host(
    photos: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = []
    tolist = Tensor.tolist

    def recording_tolist(self: Tensor) -> Any:
        copies.append(self.shape)
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", recording_tolist)
    with Synchronising():
        augmix(photos.float() / 255, generator=torch.Generator().manual_seed(0), all_ops=True)
    assert copies == [(3, len(OPERATIONS) + 1)]

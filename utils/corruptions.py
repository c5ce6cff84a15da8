"""The 15 corruptions of Hendrycks and Dietterich in 5 severities, on images of 8x8 to 256x256 pixels, grey or colour.

D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019. This is our own implementation on numpy, scipy and Pillow. Its severities are the published constants: those of
CIFAR-10-C for images of up to 32x32 pixels, those of Tiny-ImageNet-C above. Its images are not the published ones:

- All 15 are seeded by image, and values are rounded to the nearest of the 256 levels, not cut off.
- Frost is synthetic (see `_ice`); the published sets blend in photographs.
- Glass blur exchanges pixels, as the paper says; the published code copies one of the two over the other.
- Zooms and warps interpolate linearly at exact positions; the published ones crop whole pixels or interpolate twice.

At sizes other than 32x32 and 64x64, lengths that are a share of the image (zooms, warps, the grid of pixelate, the map
of the fog) scale with it, and lengths in pixels (blurs, streaks of snow, exchanged neighbours) do not: at 8x8 a quarter
of a blur of 0.3 to 1.5 pixels would change nothing. So on large images blurs are mild: those of ImageNet-C, which are
made for 224x224, are up to five times as wide.
"""

import io
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
import scipy  # not its submodules: all scripts import this file for its names, and they would take a fifth of a second
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

SEVERITIES = (1, 2, 3, 4, 5)
SIZES = (8, 256)
CHUNK = 128 * 64**2  # pixels in float64 at once, so that memory does not grow with the number of images

Draws = list[np.random.RandomState]

# By corruption, in the published order: its function, and its constants for severities 1 to 5, of CIFAR-10-C and of
# Tiny-ImageNet-C. Filled by `_register`.
FUNCTIONS: dict[str, Callable] = {}
CONSTANTS: dict[str, tuple[tuple, tuple]] = {}


def corrupt(
    images: np.ndarray, name: str, severity: int, seed: int = 0, indices: Iterable[int] | None = None
) -> np.ndarray:
    """Apply one corruption at one severity to a batch of images.

    Each image has its own random generator, seeded by (seed, name, severity, index): its result does not depend on the
    other images of the batch, on their order, or on the process that computes it.

    Args:
        images: uint8 [N, H, W, C], H = W from 8 to 256, C = 1 (grey) or 3 (RGB).
        name: a key of `CONSTANTS`.
        severity: 1 to 5.
        seed: 0 to 2^32 - 1; another seed gives other noise, snow, angles and so on.
        indices: N whole numbers, 0 to 2^32 - 1: the places of the images in their data set. Default: 0 to N - 1.

    Returns:
        uint8 [N, H, W, C], the values 0 to 255 rounded to the nearest.

    Raises:
        ValueError: naming the argument, what was expected and what was given.
    """
    shape, (low, high) = np.shape(images), SIZES
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        found = f"{images.dtype} {list(shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images: expected uint8 [N, H, W, C], got {found}")
    if shape[1] != shape[2] or not low <= shape[1] <= high or shape[3] not in (1, 3):
        raise ValueError(f"images: expected squares of {low} to {high} pixels, 1 or 3 channels, got {list(shape)}")
    if name not in CONSTANTS:
        raise ValueError(f"name: expected one of {', '.join(CONSTANTS)}, got {name!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity: expected a whole number from 1 to 5, got {severity!r}")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected a whole number from 0 to 2^32 - 1, got {seed!r}")
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    if indices.shape != shape[:1] or (indices.dtype.kind not in "iu" and len(indices)):
        raise ValueError(f"indices: expected {shape[0]} whole numbers, got {indices.dtype} {list(indices.shape)}")
    if len(indices) and (indices.min() < 0 or indices.max() >= 2**32):
        raise ValueError(f"indices: expected 0 to 2^32 - 1, got {indices.min()} to {indices.max()}")

    constants = CONSTANTS[name][shape[1] > 32][int(severity) - 1]
    constants = constants if isinstance(constants, tuple) else (constants,)
    result = np.empty_like(images)
    chunk = CHUNK // max(shape[1], 64) ** 2
    for start in range(0, len(images), chunk):
        part = slice(start, start + chunk)
        random = [_generator(seed, name, severity, index) for index in indices[part]]
        result[part] = _bytes(FUNCTIONS[name](images[part] / 255, random, *constants))
    return result


def _generator(seed: int, name: str, severity: int, index: int) -> np.random.RandomState:
    # The distributions of RandomState are frozen, those of default_rng may change between versions of numpy. Philox
    # takes four numbers of 32 bits as they are, as its key; other generators need ten times as long to be seeded.
    numbers = (seed, zlib.crc32(name.encode()), severity, index)
    return np.random.RandomState(np.random.Philox(key=sum(int(n) << 32 * i for i, n in enumerate(numbers))))


def _register(cifar: tuple, tiny: tuple) -> Callable[[Callable], Callable]:
    """Enter a function in the tables, with its constants for severities 1 to 5 in the two published sets."""

    def enter(function: Callable) -> Callable:
        name = function.__name__.removeprefix("_")
        FUNCTIONS[name], CONSTANTS[name] = function, (cifar, tiny)
        return function

    return enter


# From here on: x is float64 [N, S, S, C] in [0, 1], random holds a generator for each image, and what follows are the
# constants of a severity. Results may leave [0, 1]: `corrupt` clips them.


def _bytes(x: np.ndarray) -> np.ndarray:
    """[0, 1] to 0 .. 255. The small number sends exact halves up, whatever the last bit of x is on this machine."""
    return np.floor(np.clip(x, 0, 1) * 255 + (0.5 + 1e-7)).astype(np.uint8)


@_register((0.04, 0.06, 0.08, 0.09, 0.10), (0.04, 0.08, 0.12, 0.15, 0.18))
def _gaussian_noise(x: np.ndarray, random: Draws, deviation: float) -> np.ndarray:
    """`deviation` is the standard deviation of pixels in [0, 1]."""
    return x + np.stack([r.normal(0, deviation, x.shape[1:]) for r in random])


@_register((500, 250, 100, 75, 50), (250, 100, 50, 30, 15))
def _shot_noise(x: np.ndarray, random: Draws, photons: int) -> np.ndarray:
    """`photons` of a white pixel."""
    return np.stack([r.poisson(photons * image) / photons for r, image in zip(random, x, strict=True)])


@_register((0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14))
def _impulse_noise(x: np.ndarray, random: Draws, share: float) -> np.ndarray:
    """`share` of the values become black or white."""
    u = np.stack([r.uniform(size=x.shape[1:]) for r in random])
    return np.where(u < share, u < share / 2, x)


@_register(
    ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
)
def _defocus_blur(x: np.ndarray, random: Draws, radius: float, softness: float) -> np.ndarray:
    """A disc of this radius, its edge smoothed by a Gaussian of standard deviation `softness`."""
    reach = int(radius) + 1  # one more than the disc: its edge is smoothed over 3x3 pixels
    at = np.arange(-reach, reach + 1)
    disc = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    edge = np.exp(-(np.array([-1.0, 0, 1]) ** 2) / (2 * softness**2))
    kernel = scipy.ndimage.convolve(disc / disc.sum(), np.outer(edge, edge) / edge.sum() ** 2, mode="constant")
    return scipy.ndimage.convolve(x, kernel[None, :, :, None], mode="mirror")


@_register(
    ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
)
def _glass_blur(x: np.ndarray, random: Draws, sigma: float, reach: int, passes: int) -> np.ndarray:
    """`passes` exchanges of pixels up to `reach` apart, between two Gaussian blurs."""
    n, size = len(x), x.shape[1]
    x = _smooth(x, sigma)
    inner = range(size - reach, reach, -1)
    # Neighbours lie up to `reach` before and up to `reach` - 1 behind, as in the published code.
    shifts = np.stack([r.randint(-reach, reach, (passes, len(inner) ** 2, 2)) for r in random], axis=-1)
    source = np.repeat(np.arange(size**2)[:, None], n, axis=1)  # [pixels, N]: where each pixel comes from
    every = np.arange(n)
    for shift in shifts:
        pixels = (row * size + column for row in inner for column in inner)
        for pixel, (down, right) in zip(pixels, shift, strict=True):
            other = pixel + down * size + right
            source[pixel], source[other, every] = source[other, every], source[pixel].copy()
    shuffled = np.take_along_axis(x.reshape(n, size**2, -1), source.T[:, :, None], axis=1)
    return _smooth(shuffled.reshape(x.shape), sigma)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    return scipy.ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


@_register(((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)))
def _motion_blur(x: np.ndarray, random: Draws, radius: int, sigma: float) -> np.ndarray:
    return _trace(x, radius, sigma, np.array([r.uniform(-45, 45) for r in random]))


def _trace(x: np.ndarray, radius: int, sigma: float, degrees: np.ndarray, border: str = "edge") -> np.ndarray:
    """Motion blur by ImageMagick's rule: half a Gaussian of 2 radius + 1 pixels, in a direction for each image."""
    reach, angle = 2 * radius, np.deg2rad(degrees)
    steps = np.arange(reach + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    padded = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode=border)
    # [N, 2 reach + 1, 2 reach + 1, C, S, S]: all shifts, as a view.
    shifted = sliding_window_view(padded, x.shape[1:3], axis=(1, 2))
    every = np.arange(len(x))
    result = np.zeros_like(x.transpose(0, 3, 1, 2))
    for step, weight in zip(steps, weights / weights.sum(), strict=True):
        down, right = (np.ceil(step * part - 0.5).astype(int) for part in (np.sin(angle), np.cos(angle)))
        result += weight * shifted[every, reach + down, reach + right]
    return result.transpose(0, 2, 3, 1)


@_register((1.06, 1.11, 1.16, 1.21, 1.26), (1.06, 1.11, 1.16, 1.21, 1.26))
def _zoom_blur(x: np.ndarray, random: Draws, end: float) -> np.ndarray:
    """Zoom factors 1, 1.01, 1.02, ... up to `end`."""
    return _zoom(x, (1.0, *np.arange(1, end, 0.01)))


def _zoom(x: np.ndarray, factors: tuple) -> np.ndarray:
    """The mean of the images zoomed about their middle by each of the factors, 1 or more."""
    n, size, _, channels = x.shape
    columns = x.transpose(1, 2, 0, 3).reshape(size**2, n * channels)
    return (_zoom_matrix(size, factors) @ columns).reshape(size, size, n, channels).transpose(2, 0, 1, 3)


@lru_cache
def _zoom_matrix(size: int, factors: tuple) -> "scipy.sparse.csr_array":
    """Sparse [S^2, S^2]. A zoom interpolates linearly along rows and columns, a Kronecker product of two [S, S]."""
    middle, total = (size - 1) / 2, 0
    for factor in factors:
        at = middle + (np.arange(size) - middle) / factor
        low = np.minimum(at.astype(int), size - 2)
        values, columns = np.concatenate([1 - (at - low), at - low]), np.concatenate([low, low + 1])
        line = scipy.sparse.csr_array((values, (np.tile(np.arange(size), 2), columns)), (size, size))
        total = total + scipy.sparse.kron(line, line, format="csr") / len(factors)
    return total


# Mean, deviation, zoom and threshold of the flakes, radius and deviation of their trace; the same at both sizes.
FLAKES = (
    (0.1, 0.2, 1, 0.6, 8, 3),
    (0.1, 0.2, 1, 0.5, 10, 4),
    (0.15, 0.3, 1.75, 0.55, 10, 4),
    (0.25, 0.3, 2.25, 0.6, 12, 6),
    (0.3, 0.3, 1.25, 0.65, 14, 12),
)


@_register(
    tuple((*flake, original) for flake, original in zip(FLAKES, (0.95, 0.9, 0.9, 0.85, 0.8), strict=True)),
    tuple((*flake, original) for flake, original in zip(FLAKES, (0.8, 0.8, 0.7, 0.65, 0.6), strict=True)),
)
def _snow(x: np.ndarray, random: Draws, *constants: float) -> np.ndarray:
    """Flakes on a paler image: a row of `FLAKES`, and the share of the image as it was."""
    mean, deviation, zoom, threshold, radius, sigma, original = constants
    flakes = _zoom(np.stack([r.normal(mean, deviation, (*x.shape[1:3], 1)) for r in random]), (float(zoom),))
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _trace(flakes, radius, sigma, np.array([r.uniform(-135, -45) for r in random]))
    grey = (x * [0.299, 0.587, 0.114]).sum(axis=3) if x.shape[3] == 3 else x[..., 0]
    bleached = np.maximum(x, grey[..., None] * 1.5 + 0.5)
    return original * x + (1 - original) * bleached + flakes + flakes[:, ::-1, ::-1]


@_register(
    ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
)
def _frost(x: np.ndarray, random: Draws, image: float, ice: float) -> np.ndarray:
    """`image` and `ice` are the shares of the two."""
    tint = np.array([0.85, 0.95, 1.0]) if x.shape[3] == 3 else 0.95
    return image * x + ice * tint * _ice(x.shape[1], random)


def _ice(size: int, random: Draws) -> np.ndarray:
    """A texture like frost on a window, [N, S, S, 1] in [0, 1]: needles in three directions on patches of rime."""
    patches = _plasma(size, 1.6, random)
    first = np.array([r.uniform(0, 60) for r in random])
    radius, sigma = max(2, size // 8), size / 10
    needles = np.zeros_like(patches)
    for turn in (0, 120, 240):  # ice grows at angles of 60 degrees
        seeds = np.stack([r.uniform(size=(size, size, 1)) > 0.9 for r in random]).astype(float)
        needles = np.maximum(needles, _trace(seeds, radius, sigma, first + turn, border="wrap"))
    needles /= needles.max(axis=(1, 2, 3), keepdims=True).clip(1e-9)
    return np.clip(patches * 0.7 + needles * (0.2 + 0.6 * patches), 0, 1)


@_register(((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)), ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)))
def _fog(x: np.ndarray, random: Draws, thickness: float, smoothness: float) -> np.ndarray:
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    fogged = x + thickness * _plasma(x.shape[1], smoothness, random)
    return fogged * brightest / (brightest + thickness)


def _plasma(size: int, smoothness: float, random: Draws) -> np.ndarray:
    """A cloud for each image, [N, S, S, 1] in [0, 1], by the diamond-square method on a torus.

    Each point is the mean of four neighbours plus a uniform number of (-a, a); a shrinks by smoothness^2 each time the
    grid gets finer.
    """
    width = 1 << (size - 1).bit_length()
    noise = np.stack([r.uniform(-1, 1, (width, width)) for r in random])
    cloud, step, a = np.zeros_like(noise), width, 1.0
    while step >= 2:
        half = step // 2
        corners = cloud[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, 1)
        centres = (pairs + np.roll(pairs, -1, 2)) / 4 + a * noise[:, half::step, half::step]
        cloud[:, half::step, half::step] = centres
        across = corners + np.roll(corners, -1, 2) + centres + np.roll(centres, 1, 1)
        along = corners + np.roll(corners, -1, 1) + centres + np.roll(centres, 1, 2)
        cloud[:, ::step, half::step] = across / 4 + a * noise[:, ::step, half::step]
        cloud[:, half::step, ::step] = along / 4 + a * noise[:, half::step, ::step]
        step, a = half, a / smoothness**2
    cloud -= cloud.min(axis=(1, 2), keepdims=True)
    cloud /= cloud.max(axis=(1, 2), keepdims=True)
    return cloud[:, :size, :size, None]


@_register((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5))
def _brightness(x: np.ndarray, random: Draws, rise: float) -> np.ndarray:
    """`rise` is added to the value of HSV."""
    # HSV with the same hue and saturation and another value is RGB times the ratio of the values.
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + rise, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


@_register((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05))
def _contrast(x: np.ndarray, random: Draws, share: float) -> np.ndarray:
    """`share` remains of the distance to the mean."""
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + share * (x - mean)


@_register(
    ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
)
def _elastic_transform(x: np.ndarray, random: Draws, displacement: float, sigma: float, shift: float) -> np.ndarray:
    """Shares of the size: displacement, sigma of the Gaussian that smooths it, shift of the affine map's points."""
    size = x.shape[1]
    displacement, sigma, shift = size * displacement, size * sigma, size * shift
    middle, arm = size // 2, size // 3
    ends = np.array([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]])
    starts = ends + np.stack([r.uniform(-shift, shift, (3, 2)) for r in random])
    # The affine map [N, 3, 2] that leads from the moved points back to where they are in the image.
    homogeneous = np.concatenate([starts, np.ones((len(x), 3, 1))], axis=2)
    back = np.linalg.solve(homogeneous, np.broadcast_to(ends, starts.shape))
    field = np.stack([r.uniform(-1, 1, (2, size, size)) for r in random])
    field = displacement * scipy.ndimage.gaussian_filter(field, (0, 0, sigma, sigma), mode="reflect", truncate=3)
    at = np.indices((size, size)) + field
    factors = back[:, :, :, None, None]
    rows, columns = (at[:, 0] * factors[:, 0, k] + at[:, 1] * factors[:, 1, k] + factors[:, 2, k] for k in (0, 1))
    return _interpolate(x, rows, columns)


def _interpolate(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values at the places [N, S, S], linear between pixels, the image mirrored at its borders."""
    last = x.shape[1] - 1

    def split(at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = np.abs(at) % (2 * last)
        at = np.minimum(at, 2 * last - at)
        low = np.minimum(at.astype(int), last - 1)
        return low, (at - low)[..., None]

    (row, down), (column, right) = split(rows), split(columns)
    every = np.arange(len(x))[:, None, None]
    above = x[every, row, column] * (1 - right) + x[every, row, column + 1] * right
    below = x[every, row + 1, column] * (1 - right) + x[every, row + 1, column + 1] * right
    return above * (1 - down) + below * down


@_register((0.95, 0.9, 0.85, 0.75, 0.65), (0.9, 0.8, 0.7, 0.6, 0.5))
def _pixelate(x: np.ndarray, random: Draws, share: float) -> np.ndarray:
    """`share` of the resolution remains."""
    full, box = x.shape[1:3], Image.Resampling.BOX
    small = (int(full[0] * share),) * 2
    return _by_pillow(x, lambda image: image.resize(small, box).resize(full, box))


@_register((80, 65, 58, 50, 40), (65, 58, 50, 40, 25))
def _jpeg_compression(x: np.ndarray, random: Draws, quality: int) -> np.ndarray:
    def through(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=quality)
        return Image.open(file)

    return _by_pillow(x, through)


def _by_pillow(x: np.ndarray, through: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    pictures = map(Image.fromarray, _bytes(x[..., 0] if x.shape[3] == 1 else x))
    return np.stack([np.asarray(through(picture)) for picture in pictures]).reshape(x.shape) / 255

"""The 15 corruptions of Hendrycks and Dietterich in 5 severities, on images of 8x8 to 64x64 pixels, grey or colour.

D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, ICLR
2019. This is an implementation of our own on numpy, scipy and Pillow. Its severities are the published constants, those
of CIFAR-10-C for images of up to 32x32 and those of Tiny-ImageNet-C above, but its images are not the published ones:

- All 15 are seeded by image, and values are rounded to the nearest of the 256 levels, not cut off.
- Frost is drawn by the computer (see `_ice`); the published sets blend in photographs.
- Glass blur exchanges pixels, as the paper says; the published code only copies one of the two over the other.
- Zooms and warps interpolate linearly at exact positions; the published ones crop whole pixels or interpolate twice.

At other sizes than 32x32 and 64x64, what is a share of the image's size (zooms, warps, the grid of pixelate, the map of
the fog) stays that share, and what is a length in pixels (blurs, streaks of snow, exchanged neighbours) stays that many
pixels: at 8x8 a quarter of a blur of 0.3 to 1.5 pixels would change nothing.
"""

import io
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from scipy import ndimage, sparse

SIZES = (8, 64)
CHUNK = 128  # images in float64 at once, so that memory does not grow with the number of images

# By corruption: the constants of severities 1 to 5, of CIFAR-10-C and of Tiny-ImageNet-C.
CONSTANTS = {
    # standard deviation of pixels in [0, 1]
    "gaussian_noise": ((0.04, 0.06, 0.08, 0.09, 0.10), (0.04, 0.08, 0.12, 0.15, 0.18)),
    # photons of a white pixel
    "shot_noise": ((500, 250, 100, 75, 50), (250, 100, 50, 30, 15)),
    # share of the values that become black or white
    "impulse_noise": ((0.01, 0.02, 0.03, 0.05, 0.07), (0.01, 0.02, 0.05, 0.08, 0.14)),
    # radius of the disc, deviation of the Gaussian that smooths its edge
    "defocus_blur": (
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
    ),
    # deviation of the Gaussian, largest distance of exchanged pixels, passes
    "glass_blur": (
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
    ),
    # radius and deviation of the trace
    "motion_blur": (
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
    ),
    # where the zoom factors 1, 1.01, 1.02, ... end
    "zoom_blur": ((1.06, 1.11, 1.16, 1.21, 1.26), (1.06, 1.11, 1.16, 1.21, 1.26)),
    # mean, deviation, zoom and threshold of the flakes, radius and deviation of their trace, share of the plain image
    "snow": (
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
    ),
    # share of the image, share of the ice
    "frost": (
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
    ),
    # thickness, smoothness
    "fog": (
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
    ),
    # added to the value of HSV
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5)),
    # what remains of the distance to the mean
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05)),
    # as shares of the image's size: displacement, deviation of its Gaussian, shift of the affine map's three points
    "elastic_transform": (
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
    ),
    # share of the resolution
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.9, 0.8, 0.7, 0.6, 0.5)),
    # quality of the JPEG file
    "jpeg_compression": ((80, 65, 58, 50, 40), (65, 58, 50, 40, 25)),
}

Draws = list[np.random.RandomState]


def corrupt(
    images: np.ndarray, name: str, severity: int, seed: int = 0, indices: Iterable[int] | None = None
) -> np.ndarray:
    """One corruption at one severity of a batch of images.

    What is random is drawn for each image from a generator of its own, seeded by (seed, name, severity, index), so that
    an image's result does not depend on the other images of the batch, on their order or on who computes it.

    Args:
        images: uint8 [N, H, W, C], H = W from 8 to 64, C = 1 (grey) or 3 (RGB).
        name: a key of `CONSTANTS`.
        severity: 1 to 5.
        seed: 0 to 2^32 - 1; another seed gives other noise, snow, angles and so on.
        indices: N whole numbers, 0 to 2^32 - 1: the places of the images in their data set. Default: 0 to N - 1.

    Returns:
        uint8 [N, H, W, C], the values 0 to 255 rounded to the nearest.

    Raises:
        ValueError: naming the argument and what it has to be.
    """
    shape, low, high = np.shape(images), *SIZES
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        found = f"{images.dtype} {list(shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise ValueError(f"images: {found} given, a uint8 array [N, H, W, C] is needed")
    if shape[1] != shape[2] or not low <= shape[1] <= high or shape[3] not in (1, 3):
        raise ValueError(
            f"images: {list(shape)} given, square images of {low} to {high} pixels and 1 or 3 channels are needed"
        )
    if name not in CONSTANTS:
        raise ValueError(f"name: {name!r} given, choose of {', '.join(CONSTANTS)}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity: {severity!r} given, a whole number from 1 to 5 is needed")
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
        raise ValueError(f"seed: {seed!r} given, a whole number from 0 to 2^32 - 1 is needed")
    indices = np.arange(len(images)) if indices is None else np.asarray(indices)
    if indices.shape != shape[:1] or (indices.dtype.kind not in "iu" and len(indices)):
        raise ValueError(f"indices: {indices.dtype} {list(indices.shape)} given, {shape[0]} whole numbers are needed")
    if len(indices) and (indices.min() < 0 or indices.max() >= 2**32):
        raise ValueError(f"indices: {indices.min()} to {indices.max()} given, they must be from 0 to 2^32 - 1")

    constants = CONSTANTS[name][shape[1] > 32][int(severity) - 1]
    result = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part = slice(start, start + CHUNK)
        random = [_generator(seed, name, severity, index) for index in indices[part]]
        result[part] = _bytes(FUNCTIONS[name](images[part] / 255, constants, random))
    return result


def _generator(seed: int, name: str, severity: int, index: int) -> np.random.RandomState:
    # The distributions of RandomState are frozen, those of default_rng may change between versions of numpy. Philox
    # takes four numbers of 32 bits as they are, as its key; other generators need ten times as long to be seeded.
    numbers = (seed, zlib.crc32(name.encode()), severity, index)
    return np.random.RandomState(np.random.Philox(key=sum(int(n) << 32 * i for i, n in enumerate(numbers))))


# From here on: x is float64 [N, S, S, C] in [0, 1], c are the constants, random holds a generator for each image.
# Results may leave [0, 1]: `corrupt` clips them.


def _bytes(x: np.ndarray) -> np.ndarray:
    """[0, 1] to 0 .. 255. The small number sends exact halves up, whatever the last bit of x is on this machine."""
    return np.floor(np.clip(x, 0, 1) * 255 + (0.5 + 1e-7)).astype(np.uint8)


def _gaussian_noise(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    return x + np.stack([r.normal(0, c, x.shape[1:]) for r in random])


def _shot_noise(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    return np.stack([r.poisson(c * image) / c for r, image in zip(random, x, strict=True)])


def _impulse_noise(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    u = np.stack([r.uniform(size=x.shape[1:]) for r in random])
    return np.where(u < c, u < c / 2, x)


def _defocus_blur(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    radius, softness = c
    reach = int(radius) + 1  # one more than the disc: its edge is smoothed over 3x3 pixels
    at = np.arange(-reach, reach + 1)
    disc = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    edge = np.exp(-(np.array([-1.0, 0, 1]) ** 2) / (2 * softness**2))
    kernel = ndimage.convolve(disc / disc.sum(), np.outer(edge, edge) / edge.sum() ** 2, mode="constant")
    return ndimage.convolve(x, kernel[None, :, :, None], mode="mirror")


def _glass_blur(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    sigma, reach, passes = c
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
            kept = source[pixel].copy()
            source[pixel] = source[other, every]
            source[other, every] = kept
    shuffled = np.take_along_axis(x.reshape(n, size**2, -1), source.T[:, :, None], axis=1)
    return _smooth(shuffled.reshape(x.shape), sigma)


def _smooth(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (0, sigma, sigma, 0), mode="nearest")


def _motion_blur(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    return _trace(x, *c, np.array([r.uniform(-45, 45) for r in random]))


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


def _zoom_blur(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    return _zoom(x, (1.0, *np.arange(1, c, 0.01)))


def _zoom(x: np.ndarray, factors: tuple) -> np.ndarray:
    """The mean of the images zoomed about their middle by each of the factors, 1 or more."""
    n, size, _, channels = x.shape
    columns = x.transpose(1, 2, 0, 3).reshape(size**2, n * channels)
    return (_zoom_matrix(size, factors) @ columns).reshape(size, size, n, channels).transpose(2, 0, 1, 3)


@lru_cache
def _zoom_matrix(size: int, factors: tuple) -> sparse.csr_array:
    """Sparse [S^2, S^2]. A zoom interpolates linearly along rows and columns, a Kronecker product of two [S, S]."""
    middle, total = (size - 1) / 2, 0
    for factor in factors:
        at = middle + (np.arange(size) - middle) / factor
        low = np.minimum(at.astype(int), size - 2)
        rows, part = np.arange(size), at - low
        line = sparse.csr_array(
            (np.concatenate([1 - part, part]), (np.tile(rows, 2), np.concatenate([low, low + 1]))), (size, size)
        )
        total = total + sparse.kron(line, line, format="csr") / len(factors)
    return total


def _snow(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    mean, deviation, zoom, threshold, radius, sigma, plain = c
    flakes = _zoom(np.stack([r.normal(mean, deviation, (*x.shape[1:3], 1)) for r in random]), (float(zoom),))
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _trace(flakes, radius, sigma, np.array([r.uniform(-135, -45) for r in random]))
    grey = (x * [0.299, 0.587, 0.114]).sum(axis=3) if x.shape[3] == 3 else x[..., 0]
    bleached = np.maximum(x, grey[..., None] * 1.5 + 0.5)
    return plain * x + (1 - plain) * bleached + flakes + flakes[:, ::-1, ::-1]


def _frost(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    image, ice = c
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


def _fog(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    thickness, smoothness = c
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


def _brightness(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    # HSV with the same hue and saturation and another value is RGB times the ratio of the values.
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + c, 1)
    return np.where(value > 0, x * (raised / np.where(value > 0, value, 1)), raised)


def _contrast(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return mean + c * (x - mean)


def _elastic_transform(x: np.ndarray, c: tuple, random: Draws) -> np.ndarray:
    size = x.shape[1]
    displacement, sigma, shift = (size * share for share in c)
    middle, arm = size // 2, size // 3
    ends = np.array([[middle + arm, middle + arm], [middle + arm, middle - arm], [middle - arm, middle - arm]])
    starts = ends + np.stack([r.uniform(-shift, shift, (3, 2)) for r in random])
    # The affine map [N, 3, 2] that leads from the moved points back to where they are in the image.
    back = np.linalg.solve(
        np.concatenate([starts, np.ones((len(x), 3, 1))], axis=2), np.broadcast_to(ends, (len(x), 3, 2))
    )
    field = np.stack([r.uniform(-1, 1, (2, size, size)) for r in random])
    field = displacement * ndimage.gaussian_filter(field, (0, 0, sigma, sigma), mode="reflect", truncate=3)
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


def _pixelate(x: np.ndarray, c: float, random: Draws) -> np.ndarray:
    size = x.shape[1]
    small = int(size * c)

    def through(image: Image.Image) -> Image.Image:
        return image.resize((small, small), Image.Resampling.BOX).resize((size, size), Image.Resampling.BOX)

    return np.stack([_by_pillow(image, through) for image in x])


def _jpeg_compression(x: np.ndarray, c: int, random: Draws) -> np.ndarray:
    def through(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, format="JPEG", quality=c)
        return Image.open(file)

    return np.stack([_by_pillow(image, through) for image in x])


def _by_pillow(image: np.ndarray, through: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    picture = Image.fromarray(_bytes(image[..., 0] if image.shape[2] == 1 else image))
    return np.asarray(through(picture)).reshape(image.shape) / 255


FUNCTIONS = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}

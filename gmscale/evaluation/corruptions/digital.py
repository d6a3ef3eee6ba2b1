"""What processing does to images: contrast, colour, warps, coarse pixels and codecs."""

import io
import math

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from gmscale.errors import UsageError
from gmscale.evaluation.corruptions.filters import Draw, gaussian, gaussian_weights, length

_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)
_SATURATE = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))  # factor and offset of the saturation
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # share of the side
_QUALITY = (25, 18, 15, 10, 7)
# pixels of 224 x 224 images: deviation and sigma of the elastic field, corners of the affine map
_ELASTIC = ((0, 1, 24.4), (4.07, 19.5, 48.8), (0.815, 2.44, 4.88), (1.14, 2.44, 4.88), (1.95, 2.44, 4.88))

_LEAST_SIGMA, _LEAST_SHIFT = 0.5, 0.3


def contrast(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Draw each channel towards its mean over the image."""
    mean = pixels.mean((2, 3), keepdim=True)
    return mean + _CONTRAST[severity - 1] * (pixels - mean)


def saturate(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Change the saturation of HSV: severities 1 and 2 take colour away, the others add it; grey counts as red.

    Raises UsageError for images of one channel.
    """
    if pixels.shape[1] == 1:
        raise UsageError("saturate needs images with colour; this model's data.channels is 1")
    factor, offset = _SATURATE[severity - 1]
    value, least = pixels.amax(1, keepdim=True), pixels.amin(1, keepdim=True)
    spread = value - least
    saturation = (factor * spread / value.clamp(min=1e-6) + offset).clamp(0, 1)
    # how far each channel lies below the value, as a share of the channel that lies lowest
    red = pixels.new_tensor((0.0, 1.0, 1.0))[:, None, None]
    below = torch.where(spread > 0, (value - pixels) / spread.clamp(min=1e-6), red)
    return value * (1 - saturation * below)


def pixelate(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Shrink by averages over boxes, and enlarge by repetition, as Pillow's BOX filter does."""
    for axis in (-2, -1):
        side = pixels.shape[axis]
        small = max(1, int(side * _PIXELATE[severity - 1]))
        edges = (torch.arange(small + 1, device=pixels.device) * (side / small) + 0.5).floor().long()
        sums = F.pad(pixels.double().cumsum(axis), (1, 0) if axis == -1 else (0, 0, 1, 0)).index_select(axis, edges)
        widths = edges.diff().view(-1, *[1] * (-axis - 1))
        places = ((torch.arange(side, device=pixels.device) + 0.5) * (small / side)).floor().long()
        pixels = (sums.diff(dim=axis) / widths).to(pixels.dtype).index_select(axis, places)
    return pixels


def jpeg_compression(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Encode and decode as JPEG with 4:2:0 colour, one image after another: a codec knows no batches."""
    images = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    decoded = np.stack([_through_jpeg(image, _QUALITY[severity - 1]) for image in images])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2).to(pixels.device, pixels.dtype) / 255


def _through_jpeg(image: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """Return uint8 [H, W, C] after JPEG. Pillow encodes, as for ImageNet-C; simplejpeg decodes alike but faster."""
    grey = image.shape[2] == 1
    file = io.BytesIO()
    Image.fromarray(image[..., 0] if grey else image).save(file, "JPEG", quality=quality)
    space = "GRAY" if grey else "RGB"
    decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(file.getvalue(), space, fastdct=False, fastupsample=False)
    return decoded


def elastic_transform(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Move pixels by an affine map and a smooth random field, with edges reflected.

    Severities 1 and 2 are large and smooth, the others small and wrinkled.
    """
    height, width = pixels.shape[-2:]
    places = elastic_places(pixels, severity, draw)
    grid = 2 * places / places.new_tensor((width - 1, height - 1)) - 1
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="reflection", align_corners=True)


def elastic_places(pixels: Tensor, severity: int, draw: Draw) -> Tensor:
    """Return from where each pixel is taken: x and y, [N, H, W, 2].

    The affine map takes three points, a third of the image away from its centre, to where they are moved by an even
    draw. The field is even noise smoothed by a Gaussian. ImageNet-C gives it as (alpha, sigma): its deviation is
    alpha / (2 sqrt(3 pi) sigma), which for 1 has no room in an image but for a shift.
    """
    deviation, sigma, corner = _ELASTIC[severity - 1]
    height, width = pixels.shape[-2:]
    uniform = 2 * draw(6 + 2 * height * width) - 1
    y, x = torch.meshgrid(*(torch.arange(n, device=pixels.device) for n in (height, width)), indexing="ij")
    places = torch.stack((x, y), -1).to(pixels.dtype).expand(len(pixels), -1, -1, -1)
    if deviation:
        sigma, wanted = length(sigma, pixels, _LEAST_SIGMA), length(deviation, pixels, _LEAST_SHIFT)
        smooth = gaussian(uniform[:, 6:].view(-1, 2, height, width), sigma)
        # what smoothing along both axes leaves of the deviation of even noise, 1 / sqrt(3)
        left = float(gaussian_weights(sigma).square().sum()) / math.sqrt(3)
        places = places + (wanted / left) * smooth.movedim(1, -1)
    third, centre = min(height, width) // 3, places.new_tensor((width // 2, height // 2))
    points = centre + third * places.new_tensor([[1, 1], [1, -1], [-1, -1]])
    moved = points + length(corner, pixels) * uniform[:, :6].view(-1, 3, 2)
    # places = A (moved point, 1), in double precision: what is sampled must not depend on the batch
    corners = torch.cat((moved, torch.ones_like(moved[..., :1])), -1).double()
    affine = torch.linalg.solve(corners, points.double().expand(len(pixels), -1, -1)).to(pixels.dtype)
    of_x, of_y, shift = affine[:, :, None, None].unbind(1)
    return places[..., :1] * of_x + places[..., 1:] * of_y + shift

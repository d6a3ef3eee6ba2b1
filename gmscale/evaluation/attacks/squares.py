"""The Square Attack: a random search with square patches that needs a model's scores only, not its gradients.

SOURCE: Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random search",
2020, arXiv 1912.00049, algorithms 1 to 3. As in AutoAttack (Croce and Hein 2020), the first squares cover 0.8 of
the image, and the schedule of their sizes is stretched over the queries there are.
"""

import bisect
import math

import torch
from torch import Tensor, nn

from gmscale.evaluation.attacks.ball import TINY, lengths, project
from gmscale.evaluation.attacks.losses import margin
from gmscale.evaluation.draws import uniform

_FIRST_SHARE = 0.8
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10000 queries
_TILES = 5  # an L2 search starts from so many bumps along the shorter side


@torch.no_grad()
def square(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    indices: Tensor,
    *,
    eps: float,
    norm: str = "linf",
    queries: int = 200,
    key: tuple[int, int] = (0, 0),
) -> tuple[Tensor, Tensor]:
    """Return the images of least margin that were tried, [N, C, H, W], and each image's queries, int64 [N].

    The margin is the right class's logit minus the largest other; a misclassified image is queried no more. What is
    tried depends on the `key`, on the query, and on the sample's number in `indices`, int64 [N].
    """
    best, used = pixels.clone(), torch.full_like(labels, queries)
    lowest = torch.full(labels.shape, torch.inf, dtype=torch.float64, device=labels.device)
    left = torch.arange(len(labels), device=labels.device)
    for query in range(queries):
        if len(left) == 0:
            break
        draws = (indices[left], (key[0], (key[1] << 32) + query))
        own = pixels[left]
        if query == 0:
            tried = _stripes(own, *draws, eps) if norm == "linf" else _bumps(own, *draws, eps)
        else:
            share = share_of_image(query - 1, queries)  # the first square is the second query
            change = _square if norm == "linf" else _moved_mass
            tried = change(best[left], own, *draws, eps, share)
        tried = project(tried, own, eps=eps, norm=norm)
        logits = model(tried)
        fooled = logits.argmax(1) != labels[left]
        now = margin(logits, labels[left])
        better = (now < lowest[left]) | fooled
        best[left[better]], lowest[left[better]] = tried[better], now[better]
        used[left[fooled]] = query + 1
        left = left[~fooled]
    return best, used


def share_of_image(query: int, queries: int) -> float:
    """Return which share of the image a square covers after `query` of them: 0.8 at first, halved nine times."""
    return float(_FIRST_SHARE / 2 ** bisect.bisect_left(_HALVED_AFTER, 10000 * query // queries))


# ---- L-inf: in a square all of a channel is at one face of the ball ----------------------------------------------


def _stripes(pixels: Tensor, indices: Tensor, key: tuple[int, int], eps: float) -> Tensor:
    """Return images with vertical stripes, each at one face of the ball."""
    count, channels, _, width = pixels.shape
    signs = _signs(uniform(indices, channels * width, key)).view(count, channels, 1, width)
    return pixels + eps * signs


def _square(
    best: Tensor, pixels: Tensor, indices: Tensor, key: tuple[int, int], eps: float, share: float
) -> Tensor:
    _, channels, height, width = pixels.shape
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    draws = uniform(indices, 2 + channels, key)
    rows, columns = _places(draws[:, :2], side, height, width)
    signs = _signs(draws[:, 2:])[:, :, None, None]
    return torch.where(_inside(rows, columns, side), pixels + eps * signs, best)


# ---- L2: what two windows had of the radius goes into one bump ---------------------------------------------------


def _bumps(pixels: Tensor, indices: Tensor, key: tuple[int, int], eps: float) -> Tensor:
    """Return images with a grid of bumps of random signs and orientations, of length `eps` in all."""
    count, channels, height, width = pixels.shape
    side = max(min(height, width) // _TILES, 1)
    grid = (height // side, width // side)
    draws = _signs(uniform(indices, (channels + 1) * grid[0] * grid[1], key)).view(count, channels + 1, *grid)
    bump = _bump(side, pixels)
    upright = (draws[:, :1] > 0)[..., None, None]
    tiles = draws[:, 1:, ..., None, None] * torch.where(upright, bump, bump.T)
    change = torch.zeros_like(pixels)
    top, left = (height - grid[0] * side) // 2, (width - grid[1] * side) // 2
    laid = tiles.transpose(3, 4).reshape(count, channels, grid[0] * side, grid[1] * side)
    change[:, :, top : top + laid.shape[2], left : left + laid.shape[3]] = laid
    return pixels + change * (eps / lengths(change).clamp_min(TINY))


def _moved_mass(
    best: Tensor, pixels: Tensor, indices: Tensor, key: tuple[int, int], eps: float, share: float
) -> Tensor:
    _, channels, height, width = pixels.shape
    side = max(round(math.sqrt(share * height * width)), 3)
    side = min(side | 1, (min(height, width) - 1) | 1)  # odd
    draws = uniform(indices, 5 + channels, key)
    rows, columns = _places(draws[:, :2], side, height, width)
    window = _inside(rows, columns, side)
    emptied = _inside(*_places(draws[:, 2:4], side, height, width), side)
    bump = _bump(side, pixels)
    at = rows.clamp(0, side - 1)[:, :, None], columns.clamp(0, side - 1)[:, None, :]
    upright = (draws[:, 4] < 0.5)[:, None, None]
    placed = torch.where(upright, bump[at], bump.T[at])[:, None] * window

    change = best - pixels
    unused = (eps**2 - lengths(change) ** 2).clamp_min(0)
    radius = (_channel_lengths(change * (window | emptied)) ** 2 + unused / channels).sqrt()
    own = change * window
    new = _signs(draws[:, 5:])[:, :, None, None] * placed + own / _channel_lengths(own).clamp_min(TINY)
    new = new * (radius / _channel_lengths(new).clamp_min(TINY))
    return pixels + torch.where(window, new, change * ~emptied)


def _bump(side: int, like: Tensor) -> Tensor:
    """Return eta, [side, side] of length 1: two hills side by side, one of them upside down (the paper's eq. 2)."""
    half = side // 2
    bump = torch.cat((_hill(side, half), -_hill(side, side - half)), 1).to(like)
    return bump / torch.linalg.vector_norm(bump)


def _hill(height: int, width: int) -> Tensor:
    """Return [height, width]: d king's steps from the centre the sum of 1 / j^2 over d < j <= height // 2 + 1."""
    reach = height // 2
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    distance = torch.maximum((rows - height // 2).abs(), (columns - width // 2).abs())
    by_distance = (torch.arange(1, reach + 2, dtype=torch.float64) ** -2).flip(0).cumsum(0).flip(0)
    return torch.where(distance <= reach, by_distance[distance.clamp_max(reach)], 0)


# ---- both --------------------------------------------------------------------------------------------------------


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0)


def _places(draws: Tensor, side: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return rows [N, H] and columns [N, W], counted from each image's corner of its window, drawn by [N, 2]."""
    room = torch.tensor([height - side + 1, width - side + 1], device=draws.device)
    corner = (draws * room).long()
    rows = torch.arange(height, device=draws.device) - corner[:, :1]
    columns = torch.arange(width, device=draws.device) - corner[:, 1:]
    return rows, columns


def _inside(rows: Tensor, columns: Tensor, side: int) -> Tensor:
    """Return the window as a mask [N, 1, H, W]."""
    in_rows, in_columns = (rows >= 0) & (rows < side), (columns >= 0) & (columns < side)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def _channel_lengths(images: Tensor) -> Tensor:
    """Return the L2 norm of each channel, [N, C, 1, 1]."""
    return torch.linalg.vector_norm(images, dim=(2, 3), keepdim=True)

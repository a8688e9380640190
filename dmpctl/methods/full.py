"""Full fine-tuning: every weight of a copy of the backbone is trained. The paper's comparison."""

import copy
from typing import ClassVar

from torch import Tensor, nn

from dmpctl.methods.base import ChangedBackbone
from dmpctl.settings.methods import Full


class FullPatch(ChangedBackbone):
    """A copy of a backbone (an nn.Module that is a `types.Backbone`), trained in eval mode.

    Its tensors have the names that they have in the backbone: a saved patch is itself a backbone. A fresh one is its
    backbone, bit for bit; the backbone itself is not touched.
    """

    group: ClassVar[str] = "backbone"

    def __init__(self, backbone: nn.Module, settings: Full) -> None:
        changed = copy.deepcopy(backbone).requires_grad_(True).eval()
        super().__init__(changed, settings.lr)
        # the very dicts of the copy, so that names are its own and what moves or replaces a tensor here does so there
        self._parameters, self._buffers, self._modules = changed._parameters, changed._buffers, changed._modules
        self._non_persistent_buffers_set = changed._non_persistent_buffers_set

    def merged(self) -> dict[str, Tensor]:
        """The changed backbone's state dict: no copy, detached."""
        return dict(self.state_dict())

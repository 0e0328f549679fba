"""A net that looks at pictures as one module: called with (b 3 h w) in [-1, 1], whatever it wants done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sfumato import registry
from sfumato.errors import NotSupported
from sfumato.models.readers.loading import is_reader, load_module, net_folder
from sfumato.models.readers.preprocessing import Preprocessing

__all__ = ["PictureNet", "load_net"]


class PictureNet(nn.Module):
    """A transformers net with its normalisation: pictures (b 3 h w) in [-1, 1] in, the net's own record out.

    Layer names are those of the net: its children stand here directly.
    """

    def __init__(self, net: nn.Module, preprocessing: Preprocessing):
        super().__init__()
        self.config: Any = net.config
        self.preprocessing = preprocessing
        object.__setattr__(self, "_net", net)  # not registered: its children are, under their own names
        for child, module in net.named_children():
            self.add_module(child, module)
        self.eval()

    def train(self, mode: bool = True) -> PictureNet:
        """Sets the mode of the net too."""
        super().train(mode)
        self._net.train(mode)
        return self

    def forward(self, pixels: Tensor) -> Any:
        return self._net(pixel_values=self.preprocessing.normalised(pixels))


def load_net(name: str | Path) -> PictureNet:
    """The net in a folder or of a built-in name, frozen, in float32 and eval mode.

    Raises:
        UnknownName: nothing of this name. NotSupported: a net that does not look at pictures. BadWeights: unreadable.
    """
    folder = net_folder(name, "net", [each for each in registry.names() if is_reader(each)])
    net = load_module(folder, what="a net")
    if hasattr(net, "get_image_features") and getattr(net.config, "noised", None) is None:
        from transformers import CLIPVisionModelWithProjection

        net = load_module(folder, cls=CLIPVisionModelWithProjection, what="a CLIP's vision tower")
    if getattr(net, "main_input_name", "") != "pixel_values":
        raise NotSupported(f"{folder} holds a {type(net).__name__}, which is no transformers net for pictures.")
    return PictureNet(net, Preprocessing.of(folder))

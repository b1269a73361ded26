"""The eye: EfficientNet-Lite0 with its ImageNet weights as a vision tower that stock LLaVA can hold.

Importing this module registers the tower with transformers' auto classes; a checkpoint that names it loads only where
this was done.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

_READ: dict[tuple[str, torch.dtype, str], Tensor] = {}  # 10 to 20 kB a picture


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().reshape(-1).contiguous().view(torch.uint8).numpy()).hexdigest()


class EfficientNetLiteConfig(PreTrainedConfig):
    """A square image of `image_size` pixels becomes (image_size / patch_size)^2 features of `hidden_size`."""

    model_type = "efficientnet_lite_tower"
    network: str = "efficientnet-lite0"
    hidden_size: int = 1280
    image_size: int = 224
    patch_size: int = 112
    num_hidden_layers: int = 1


class EfficientNetLiteTower(PreTrainedModel):
    """The network's last feature map, averaged over the cells of a grid."""

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = "tower"
    input_modalities = ("image",)

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name(config.network)
        del self.net._fc  # the ImageNet classifier: features are taken before it
        self.post_init()
        self.eval()  # a module is born in training mode

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from a file."""

    def train(self, mode: bool = True) -> EfficientNetLiteTower:
        """Always in inference mode: batch statistics of training batches would change a frozen eye."""
        return super().train(False)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """[B, 3, H, W] -> last_hidden_state [B, cells, D]."""
        pixels = pixel_values.to(self.net._conv_stem.weight.dtype)
        learning = torch.is_grad_enabled() and any(weight.requires_grad for weight in self.parameters())
        cells = self._read(pixels) if pixels.device.type != "cpu" or learning else self._remembered(pixels)
        return BaseModelOutputWithPooling(last_hidden_state=cells, hidden_states=(cells,))

    def _read(self, pixels: Tensor) -> Tensor:
        grid = self.config.image_size // self.config.patch_size
        features = self.net.extract_features(pixels)
        return nn.functional.adaptive_avg_pool2d(features, grid).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def _remembered(self, pixels: Tensor) -> Tensor:
        """A frozen eye reads a picture once: on a CPU it costs as much as half of an answer, and the study asks about
        every board many times. What it read is found again by the bytes of weights, precision and picture."""
        precision = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else pixels.dtype
        weights = "".join(_digest(weight) for weight in self.net.state_dict().values())  # 9 MB: milliseconds
        weights = hashlib.sha256(weights.encode()).hexdigest()
        keys = [(weights, precision, _digest(picture)) for picture in pixels]
        new = {key: k for k, key in enumerate(keys) if key not in _READ}
        if new:
            # training reads what was remembered while sampling; leaving inference mode turns gradients on again
            with torch.inference_mode(False), torch.no_grad():
                fresh = self._read(pixels[list(new.values())])
            _READ.update(zip(new, fresh, strict=True))
        return torch.stack([_READ[key] for key in keys])


def load_weights(tower: EfficientNetLiteTower, path: str) -> None:
    """Put the published weights in. The file is a pickle, so it is read as tensors only."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    result = tower.net.load_state_dict(weights, strict=False)
    unexpected = [name for name in result.unexpected_keys if not name.startswith("_fc.")]
    if result.missing_keys or unexpected:
        raise ValueError(f"{path}: missing {result.missing_keys[:3]}, unexpected {unexpected[:3]}.")


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteTower)

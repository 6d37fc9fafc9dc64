"""The image processor of PaliGemma with torchvision's backend, in the operations of torch that torchvision calls.

torchvision's release has to be torch's own, and its wheels for the CPU are not everywhere. A module of its own, as
worker processes import the class by name.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil


class SiglipImageProcessorTorch(SiglipImageProcessorPil):
    """Resizes uint8 [3, H, W] with torch's antialiased kernel, then normalizes all images at once."""

    def preprocess(self, images: Sequence[Image.Image], **_: Any) -> BatchFeature:
        size = [self.size["height"], self.size["width"]]
        pixels = torch.cat([torch.nn.functional.interpolate(_channels(one), size, **_KERNEL) for one in images])
        return BatchFeature({"pixel_values": (pixels.float() - 127.5).div_(127.5)})


_KERNEL = {"mode": "bicubic", "antialias": True}


def _channels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]

"""Models larger than the device: the frozen weights of the layers lie in CPU memory or on the disk, and come when they run.

layers.py   whose turn it is, and how a layer's weights come and go
disk.py     tensors in mapped files
"""

from finetune.train.offload.disk import Scratch, is_memory
from finetune.train.offload.layers import Fetched, Mapped, Streamed, check, layers_of, stream

__all__ = ["Fetched", "Mapped", "Scratch", "Streamed", "check", "is_memory", "layers_of", "stream"]

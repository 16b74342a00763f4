"""Layer offloading: frozen weights of the decoder's layers stay in CPU memory or on disk, and are fetched when a layer runs.

layers.py   which layer runs next, and how its weights are fetched and released
disk.py     tensors in memory-mapped files
"""

from finetune.train.offload.disk import Scratch, is_memory
from finetune.train.offload.layers import Fetched, Mapped, Streamed, check, layers_of, stream

__all__ = ["Fetched", "Mapped", "Scratch", "Streamed", "check", "is_memory", "layers_of", "stream"]

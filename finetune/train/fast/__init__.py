"""The fast step: the same results as the model's own code, with less memory and in less time.

patching.py       finds what can be patched in a model, tries it out, and installs and removes the patches
blocks.py         recognizes RMSNorms and gated MLPs by what they compute
attention.py      attention of packed rows without padding; segments.py: where their samples lie
kernels.py        elementwise pieces that torch.compile makes one kernel of
chunked_loss.py   the head's product and the cross-entropy together, without whole logits
"""

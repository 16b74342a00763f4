"""Faster implementations of parts of a training step, with the same results and less memory.

    patching.py       finds what can be patched in a model, verifies it, and installs and removes the patches
    blocks.py         recognizes RMSNorms and gated MLPs by their outputs
    attention.py      attention of packed sequences without padding; segments.py: the bounds of their samples
    kernels.py        elementwise functions that torch.compile fuses into one kernel
    chunked_loss.py   fused linear cross-entropy, without materializing all logits

State that training attaches to objects of other libraries, and what removes it (`quant/README.md` lists that of `quant`):

    on                                                  what                                          removed by
    modules of a model: norms, gated MLPs, adapters     an attribute `forward`                        FastStep.remove
    its decoder                                         a forward pre-hook                            FastStep.remove
    its configurations                                  `_attn_implementation`                        FastStep.remove
    outputs of patched norms and gates                  an attribute `recompute_fn` (quant/lora.py)   the tensor
    a file of transformers: modeling_llama, …           `apply_rotary_pos_emb`                        the last FastStep.remove
    transformers' registers of attention and masks      an entry; one more while a model is verified  the last FastStep.remove
    torch._dynamo.config                                `recompile_limit`                             the last FastStep.remove
    layers that are streamed (offload/layers.py)        pre-hooks; on parameters `streamed`           Streamed.restore
    layers that are sharded (parallel.py)               torch's FSDP, hooks and `streamed`            parallel.restore
    a teacher and its student (distill.py)              forward hooks                                 Distillation.detach
    parameters that are updated in the backward pass    gradient hooks                                LowMemory.remove_hooks
    signal handlers (signals.py)                        while the loop runs                           the end of the loop
    glibc's allocator (memory.keep_freed_memory)        two settings, on a CPU                        the process
"""

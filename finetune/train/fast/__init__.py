"""The fast step: the same results as the model's own code, with less memory and in less time.

    patching.py       finds what can be patched in a model, tries it out, and installs and removes the patches
    blocks.py         recognizes RMSNorms and gated MLPs by what they compute
    attention.py      attention of packed rows without padding; segments.py: where their samples lie
    kernels.py        elementwise pieces that torch.compile makes one kernel of
    chunked_loss.py   the head's product and the cross-entropy together, without whole logits

What training hangs on objects of others, and what takes it away again (`quant/README.md` has the same list for `quant`):

    on                                                  what                                          gone with
    modules of a model: norms, gated MLPs, adapters     an attribute `forward`                        FastStep.remove
    its decoder                                         a forward pre-hook                            FastStep.remove
    its configurations                                  `_attn_implementation`                        FastStep.remove
    outputs of patched norms and gates                  an attribute `recompute_fn` (quant/lora.py)   the tensor
    a file of transformers: modeling_llama, …           `apply_rotary_pos_emb`                        FastStep.remove, of the last
    transformers' registers of attention and masks      an entry of ours; one while a model is tried  FastStep.remove, of the last
    torch._dynamo.config                                `recompile_limit`                             FastStep.remove, of the last
    layers that are streamed (offload/layers.py)        pre-hooks; on parameters `streamed`           Streamed.restore
    layers that are sharded (parallel.py)               torch's FSDP, hooks and `streamed`            parallel.restore
    a teacher and its student (distill.py)              forward hooks                                 Distillation.detach
    parameters that are updated in the backward pass    gradient hooks                                LowMemory.remove_hooks
    signal handlers (signals.py)                        while the loop runs                           the end of the loop
    glibc's allocator (memory.keep_freed_memory)        two settings, on a CPU                        the process
"""

"""The residual stream in fp32 while everything else computes in half precision; for the trainer's modules.

    keep_in_fp32(backbone, config)      # hooks on transformers' own modules; decoder.py reads `residual_in_fp32`

Every layer adds two small results to a large sum. Rounded to bf16 each time, this sum makes most of the noise by which
sampler and trainer differ (docs/numerics.md). Kept in fp32 it costs 2 bytes a value more for the input of each layer,
which training with recomputed layers keeps. What layers read is rounded once, after the norm.

Left out: architectures that decoder.py does not know, which are sampled from and trained as transformers has them.
Imports a tuple of names from decoder.py; with these in its place it can be copied out alone.
"""

import torch

from .decoder import ARCHITECTURES


def keep_in_fp32(backbone, config) -> None:
    """Let `backbone` add in fp32 if it computes in half precision and decoder.py knows it. A second call does nothing.

    The embedding gives fp32, so the sums of the layers are fp32; norms and rotary tables come back in the dtype of the
    weights, so products are what they were. config: of transformers, for its model_type.
    """
    dtype = backbone.get_input_embeddings().weight.dtype
    if dtype == torch.float32 or config.model_type not in ARCHITECTURES or getattr(backbone, "residual_in_fp32", False):
        return

    # The hooks know the dtype and no module: a module that holds a hook that holds the module would be a circle, and
    # the model would outlive its last user.
    def wide(module, inputs, output):
        return output.float()

    def narrow(module, inputs, output):
        return tuple(t.to(dtype) for t in output) if isinstance(output, tuple) else output.to(dtype)

    backbone.embed_tokens.register_forward_hook(wide)
    norms = [norm for layer in backbone.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    for module in (backbone.rotary_emb, backbone.norm, *norms):
        module.register_forward_hook(narrow)
    backbone.residual_in_fp32 = True

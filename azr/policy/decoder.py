"""The transformer's forward pass for sampling, over the trainer's own modules by reference.

    decoder = Decoder(backbone, config)            # raises Unsupported for architectures it does not know
    decoder.prepare("stored", positions=2048)      # before each use: reads which adapters are on
    hidden = decoder.forward(ids, position, attend)     # (tokens, hidden), `attend` stores keys and values and attends
    decoder.release()

4-bit layers are called as they are, plain weights are read where they lie. Matrices that read the same input (q, k, v;
gate, up) are made row slices of one storage, each still its own parameter, so that one product serves them all. LoRA
stays unmerged: what `prepare` copies of it (the second matrices side by side; in half precision both) is copied once a
call of `generate`, so that there is no copy that could be stale. Numerics are those of the
trainer (lora.py, decode_ops.py): every rounding is at the same place.

Knows Qwen2 / Qwen2.5, Qwen3 (dense) and Llama 3 with static rotary scalings. Left out: other activations, sliding
windows, mixtures of experts, several adapters at once, DoRA. Imports lora.py and decode_ops.py; the three can be copied
out together (with decode_triton.py for a GPU).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .decode_ops import operations
from .lora import active_adapters, dequantized, is_plain

ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Rotary scalings whose angles depend on the position alone. With the others ("dynamic", "longrope") they change with
# the length of the text, so keys that are cached would have to be rotated again.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
ROLLOUT_WEIGHTS = ("auto", "stored", "bf16")
# fp32 rows up to which a CPU's library sums a product in an order that depends on its length (MKL): zeros that are
# added in would change the result's last bit.
FEW = 3


class Unsupported(ValueError):
    """This model cannot be sampled from by the engine; one line that says why."""


def check_architecture(backbone, config) -> None:
    """Raises Unsupported unless `Decoder` computes what this backbone computes."""
    kind = getattr(config, "model_type", None)
    if kind not in ARCHITECTURES:
        raise Unsupported(f"the engine does not know {kind} models (it knows {', '.join(ARCHITECTURES)})")
    if getattr(config, "hidden_act", None) != "silu":
        raise Unsupported(f"the engine does not know the activation {getattr(config, 'hidden_act', None)}")
    rope = getattr(backbone.rotary_emb, "rope_type", "default")
    if rope not in STATIC_ROPE:
        raise Unsupported(f"the engine does not know rotary scaling {rope} (it knows {', '.join(STATIC_ROPE)})")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        raise Unsupported("the engine knows full attention only")


# --------------------------------------------------------------------------------------------- parameters side by side


def stacked(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """The parameters, one below the other, as one tensor that IS them: their data become row slices of one storage.

    If they already lie like that, nothing is moved. After anything that gives a parameter new data, such as `.to()`,
    calling this again restores it. The parameters stay the objects that optimizers and modules hold.
    """
    first, rows = parameters[0].data, sum(p.shape[0] for p in parameters)
    # Neighbours in memory, each beginning where the one before it ends?
    address = first.data_ptr()
    for p in parameters:
        if p.data_ptr() != address or not p.is_contiguous():
            break
        address += p.numel() * p.element_size()
    else:
        # Adjacent addresses are not enough: two allocations may happen to touch, and a view must not leave its storage.
        end = (first.storage_offset() + rows * first[0].numel()) * first.element_size()
        if len({p.untyped_storage().data_ptr() for p in parameters}) == 1 and end <= first.untyped_storage().nbytes():
            return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())
    whole = torch.cat([p.data for p in parameters])
    # `.data`, so that each stays the same leaf, with its gradient and its place in the optimizer's state.
    for p, part in zip(parameters, whole.split([p.shape[0] for p in parameters])):
        p.data = part
    return whole


def _active_adapter(module) -> str | None:
    """Name of the LoRA that PEFT would apply in this layer now; None: none, or switched off."""
    names = active_adapters(module)
    if len(names) > 1:
        raise Unsupported(f"the engine knows one adapter at a time, not {', '.join(names)}")
    if names and not is_plain(module, names[0]):
        raise Unsupported("the engine knows plain LoRA only (no DoRA, no bias, no dropout)")
    return names[0] if names else None


class Projection:
    """Linear layers that read the same input, each with its LoRA or without.

    Called with x (tokens, in) of `dtype`, it returns one (tokens, out) for each layer: x W^T + b + s (x A^T) B^T, the
    formula of LoRA (Hu et al. 2021, arXiv 2106.09685). copy_weights: 4-bit layers as copies in `dtype`. Raises
    Unsupported for an adapter that is more than that.
    """

    def __init__(self, modules, dtype, copy_weights: bool):
        self.bases = [m.get_base_layer() if hasattr(m, "get_base_layer") else m for m in modules]
        self.sizes = [base.out_features for base in self.bases]
        self.outputs = sum(self.sizes)
        quantized = [getattr(base.weight, "quant_state", None) is not None for base in self.bases]
        # Stays None where a layer is in 4 bits: bitsandbytes' kernels take one packed matrix at a time.
        self.weight = self.bias = None
        # Looked up at each call of `generate`: the frozen base is sampled from with the adapter switched off.
        names = [_active_adapter(m) for m in modules]
        live = [(i, m, name) for i, (m, name) in enumerate(zip(modules, names)) if name is not None]
        low = [m.lora_A[name].weight for _, m, name in live]
        # A reads what W reads: where both are fp32 they are one product, and A's rows lie below those of W.
        self.with_low = bool(low) and dtype == torch.float32 and not any(quantized)
        if all(quantized) and copy_weights:
            self.weight = torch.cat([dequantized(base, dtype) for base in self.bases])
        elif not any(quantized):
            self.weight = stacked([base.weight for base in self.bases] + (low if self.with_low else []))
        # Qwen2 has a bias on q, k and v and on nothing else; a layer without one gets zeros, to share the product.
        biases = [base.bias for base in self.bases]
        if self.weight is not None and any(b is not None for b in biases):
            parts = [self.weight.new_zeros(n) if b is None else b.data for n, b in zip(self.sizes, biases)]
            parts += [self.weight.new_zeros(len(self.weight) - self.outputs)]
            self.bias = torch.cat(parts).to(self.weight.dtype)
        self._find_lora(live, low, dtype)
        if self.weight is not None:
            self.weight = self.weight.t()  # (in, outputs): torch.mm takes it as it is, in one call less than F.linear

    def _find_lora(self, live: list[tuple], low: list, dtype) -> None:
        """Collect the LoRA matrices that are switched on, those that can share a product side by side."""
        self.lora = []  # (which layer, B (r, out), scaling, columns of A's product)
        # One product with all A at once, since all read x. In fp32 `.to` copies nothing: the optimizer's own memory.
        self.lora_A = stacked(low).to(dtype).t() if low and not self.with_low else None
        self.lora_B = None  # of all layers at once, (columns of A's product, all outputs), where they have one scaling
        start = 0
        for i, m, name in live:
            end = start + m.lora_A[name].weight.shape[0]
            self.lora.append((i, m.lora_B[name].weight.data.to(dtype).t(), m.scaling[name], slice(start, end)))
            start = end
        # All B in one block matrix with zeros elsewhere: launching three products costs more than the zeros do.
        if self.weight is not None and len({scaling for _, _, scaling, _ in self.lora}) == 1:
            self.lora_B = self.lora[0][1].new_zeros(start, self.outputs)
            places = self.lora_B.split(self.sizes, 1)
            for i, B, _, columns in self.lora:
                places[i][columns].copy_(B)

    def __call__(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x (tokens, in) -> (tokens, out) of each layer; they may be slices of one tensor."""
        # LoRA is added into the base's result, rounded once, in the dtype of x: as LoraLinear does in training.
        low = torch.mm(x, self.lora_A) if self.lora_A is not None else None
        together = self.lora_B is not None and (x.shape[0] > FEW or x.dtype != torch.float32)
        if self.weight is None:
            out = [base(x) for base in self.bases]
        else:
            whole = torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)
            if self.with_low:
                whole, low = torch.split_with_sizes(whole, (self.outputs, whole.shape[1] - self.outputs), 1)
            # In place and on views below: `out` are slices of `whole`, nothing is copied.
            if together:
                whole.addmm_(low, self.lora_B, alpha=self.lora[0][2])
            out = torch.split_with_sizes(whole, self.sizes, 1) if len(self.sizes) > 1 else (whole,)
        for i, B, scaling, columns in () if together else self.lora:
            out[i].addmm_(low[:, columns], B, alpha=scaling)
        return out


# -------------------------------------------------------------------------------------------------------------- forward


class Layer:
    """One transformer layer: references to its modules, its projections grouped by input.

    Made anew by each `prepare`, since modules may have got other parameters: `.to()` gives them new memory.
    """

    def __init__(self, module, config, dtype, copy_weights: bool):
        attention, mlp = module.self_attn, module.mlp
        self.norm, self.mlp_norm = module.input_layernorm, module.post_attention_layernorm
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], dtype, copy_weights)
        self.out = Projection([attention.o_proj], dtype, copy_weights)
        self.gate_up = Projection([mlp.gate_proj, mlp.up_proj], dtype, copy_weights)
        self.down = Projection([mlp.down_proj], dtype, copy_weights)

    def attention(self, y, cos, sin, attend, index: int, ops, asked: torch.Tensor | None = None) -> torch.Tensor:
        """y (tokens, hidden), normed -> what the layer's attention adds, (tokens, hidden); for the `asked` alone."""
        tokens = y.shape[0]
        q, k, v = (part.view(tokens, -1, self.head_dim) for part in self.qkv(y))
        if self.q_norm is not None:  # Qwen3 norms each head's queries and keys before they are rotated
            q, k = (ops.rms_norm(t, n.weight, n.variance_epsilon) for t, n in ((q, self.q_norm), (k, self.k_norm)))
        heads = attend(index, q, k, v, cos, sin, self.scale).reshape(tokens, -1)
        return self.out(heads if asked is None else heads.index_select(0, asked))[0]

    def mlp(self, y, ops) -> torch.Tensor:
        """y (tokens, hidden), normed -> what the layer's MLP adds, (tokens, hidden)."""
        return self.down(ops.silu_mul(*self.gate_up(y)))[0]


class Decoder:
    """The layers of `backbone`, to be called on flat tokens of any sequences; `attend` knows which is which."""

    def __init__(self, backbone, config):
        check_architecture(backbone, config)
        self.backbone, self.config = backbone, config
        attention = backbone.layers[0].self_attn
        self.head_dim = attention.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.ops = operations(self.device, self.dtype)
        self.layers: list[Layer] = []
        self.cos = self.sin = None

    @property
    def dtype(self) -> torch.dtype:
        """Of computation. Asked of the embedding, which is never quantized; `.to()` may have changed it."""
        return self.backbone.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are now."""
        return self.backbone.embed_tokens.weight.device

    def prepare(self, rollout_weights: str = "stored", positions: int = 0) -> None:
        """Look the layers up again: where their parameters lie now, and which adapters are on.

        rollout_weights "bf16": 4-bit layers are replaced by copies in the dtype of computation until `release`.
        positions: rotary tables of that length.
        """
        copy_weights = rollout_weights == "bf16"
        self.layers = [Layer(module, self.config, self.dtype, copy_weights) for module in self.backbone.layers]
        rotary = self.backbone.rotary_emb
        # Angles in fp32 and rounded as cosines, as transformers does: bf16 cannot tell position 257 from 256.
        angle = torch.arange(positions, device=self.device)[:, None].float() * rotary.inv_freq.float()
        cos, sin = angle.cos() * rotary.attention_scaling, angle.sin() * rotary.attention_scaling
        # The sign that transformers' rotate_half puts on the second half of x is put on sin here, once.
        self.cos, self.sin = (torch.cat(t, -1).to(self.dtype)[:, None] for t in ((cos, cos), (-sin, sin)))

    def release(self) -> None:
        """Let go of all that `prepare` made, unpacked weights among them."""
        self.layers, self.cos, self.sin = [], None, None

    def forward(
        self, ids: torch.Tensor, position: torch.Tensor, attend, asked: torch.Tensor | None = None
    ) -> torch.Tensor:
        """ids, position (tokens,) -> (tokens, hidden) after the final norm, or of the `asked` tokens alone: their flat
        indices. The others then stop after the keys and values of the last layer.

        attend(layer index, q, k, v, cos, sin, scale) -> (tokens, heads, head_dim): rotates q and k, stores k and v,
        attends. q (tokens, heads, head_dim), k and v (tokens, kv_heads, head_dim), cos and sin (tokens, 1, head_dim),
        the first half of sin with its sign changed.
        """
        x, ops = F.embedding(ids, self.backbone.embed_tokens.weight), self.ops
        # F.embedding made a tensor of our own, so the residual stream is added to in place.
        x = x.float() if getattr(self.backbone, "residual_in_fp32", False) else x  # residual.py
        cos, sin = self.cos.index_select(0, position), self.sin.index_select(0, position)
        # Each residual sum is followed by a norm, and the two are one kernel. So the loop is shifted by a norm: a layer
        # ends with the first norm of the next one, the last layer with the backbone's.
        norms = [layer.norm for layer in self.layers] + [self.backbone.norm]
        y = ops.rms_norm(x, norms[0].weight, norms[0].variance_epsilon)
        for index, (layer, following) in enumerate(zip(self.layers, norms[1:])):
            last = asked if layer is self.layers[-1] else None
            added, norm = layer.attention(y, cos, sin, attend, index, ops, last), layer.mlp_norm
            x = x if last is None else x.index_select(0, last)
            y = ops.add_rms_norm(x, added, norm.weight, norm.variance_epsilon)
            y = ops.add_rms_norm(x, layer.mlp(y, ops), following.weight, following.variance_epsilon)
        return y

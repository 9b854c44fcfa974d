"""The last layer's MLP, and all that follows, only for the tokens whose result is asked for.

    only_asked(backbone)                                            # once
    backbone(input_ids=ids, asked=flat).last_hidden_state           # (1, asked, H); without `asked` as before

Scoring reads the states before response tokens; of a prompt the last layer gives keys and values, and no more is used.
In the embedded model, with four layers and prompts twice as long as its answers, that is a sixth of the MLPs' products.
For the layers of decoder.py's architectures, which all are written like this. Left out: the queries of these tokens.
"""

import torch


class _OnlyAsked:
    """In front of a decoder layer's class."""

    def forward(self, hidden_states, *arguments, asked: torch.Tensor | None = None, **options):
        """The layer's result (batch, time, H), or for `asked`, flat indices of tokens, (1, asked, H)."""
        if asked is None:
            return super().forward(hidden_states, *arguments, **options)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *arguments, **options)
        hidden = (hidden_states + attended).flatten(0, 1).index_select(0, asked)[None]
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def only_asked(backbone) -> None:
    """Gives the last layer the forward above; a second call does nothing. Its class changes, as in lora.py: a function
    stored in it would refer to the layer, and the model would outlive its last user."""
    layer = backbone.layers[-1]
    kind = type(layer)
    if isinstance(layer, _OnlyAsked):
        return
    layer.__class__ = type(f"OnlyAsked{kind.__name__}", (_OnlyAsked, kind), {})

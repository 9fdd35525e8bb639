"""Initial weights of a teacher whose blocks are to do different work.

They grow with depth, so that every block rewrites about the same share of the residual stream; attention starts weak,
so that the tokens of one image become alike late. `leap_dist.pretraining.demo` says what that does on the digits.
"""

from __future__ import annotations

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from leap_dist.pretraining.recipe import InitialWeights


def initialise(model: VisionTransformer, weights: InitialWeights) -> None:
    """Draw the initial weights from torch's global generator; with init_std=None leave timm's."""
    if weights.init_std is None:
        return
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=weights.init_std)
    for depth, block in enumerate(model.blocks):
        block.attn.proj.weight.data *= weights.attention_scale * weights.attention_growth**depth
        block.mlp.fc2.weight.data *= weights.mlp_scale * weights.mlp_growth**depth
    nn.init.trunc_normal_(model.pos_embed, std=weights.embed_std)
    nn.init.trunc_normal_(model.cls_token, std=weights.embed_std)

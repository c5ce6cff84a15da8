"""A vision transformer of the size of ViT-T/16 (192 dimensions, 12 layers, 3 heads) for small images.

Reference: Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021. An image is cut into 8x8 patches whatever
its size (4x4 pixels at 32x32, 8x8 pixels at 64x64). Pre-norm blocks, class token, learnable positions, no dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCHES = 8  # along each side


class Tokens(nn.Module):
    """Puts the class token before the patches and adds the positions: [B, T, D] -> [B, T + 1, D]."""

    def __init__(self, patches: int, dim: int):
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class VisionTransformer(nn.Module):
    """12 blocks of `3 * width` dimensions and 3 heads."""

    def __init__(self, num_classes: int, width: int, image_size: int, in_channels: int = 3):
        super().__init__()
        dim, patch = 3 * width, image_size // PATCHES
        self.patch_embed = nn.Conv2d(in_channels, dim, patch, stride=patch)
        self.tokens = Tokens(PATCHES**2, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads=3) for _ in range(12)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        for parameter in (self.tokens.cls_token, self.tokens.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.patch_embed(x).flatten(2).transpose(1, 2))
        return self.head(self.norm(self.blocks(x))[:, 0])

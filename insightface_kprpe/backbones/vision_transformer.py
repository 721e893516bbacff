"""The ViT of InsightFace's arcface_torch, with absolute, contextual (iRPE) or keypoint-relative (KPRPE) positions.

No class token: all patch tokens are flattened into the embedding head. Parameter names are those of the published
arcface_torch and CVLface checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from ._timm import Block, PatchEmbed
from .relative_position import ContextualAttention, KeypointRelativePosition, bucket_index, check_keypoints

POSITIONS = (None, "irpe", "kprpe")


class VisionTransformer(nn.Module):
    """A ViT that embeds a face crop; with ``position="kprpe"`` it looks relative to the face's keypoints.

    Args:
        img_size: side of the square input, pixels.
        patch_size: side of a patch, pixels; pixels beyond the last whole patch are not seen.
        embed_dim: D, width of a token.
        depth: L, number of blocks.
        num_heads: H, attention heads a block; divides ``embed_dim``.
        mlp_ratio: hidden width of the MLPs, as a multiple of ``embed_dim``.
        num_features: length of the embedding.
        position: None (absolute only), "irpe" or "kprpe".
        num_keypoints: K, 2 to 5 (KPRPE only).
        kprpe_sharing: which tables are shared: "none" (the published models), "layers", "heads" or "both".
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        mask_ratio: share of the patches hidden from the blocks in training, in [0, 1).
        fp16: run under float16 autocast by itself on CUDA, as arcface_torch's networks do.

    Attributes:
        finds_keypoints: whether ``forward`` finds the keypoints itself where none are given.
    """

    finds_keypoints = False

    def __init__(
        self,
        img_size: int = 112,
        patch_size: int = 8,
        embed_dim: int = 512,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        num_features: int = 512,
        position: str | None = None,
        num_keypoints: int = 5,
        kprpe_sharing: str = "none",
        drop_path_rate: float = 0.0,
        mask_ratio: float = 0.0,
        fp16: bool = False,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {POSITIONS}, got {position!r}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
        self.img_size = img_size
        self.num_features = num_features
        self.position = position
        self.mask_ratio = mask_ratio
        self.fp16 = fp16
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, embed_dim=embed_dim)
        grid_size, num_patches = self.patch_embed.grid_size[0], self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches, embed_dim))
        if mask_ratio > 0:
            self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                drop_path=drop_path_rate * layer / max(depth - 1, 1),
                act_layer=nn.ReLU6,
                norm_layer=nn.LayerNorm,
            )
            for layer in range(depth)
        )
        if position == "irpe":
            for block in self.blocks:
                block.attn = ContextualAttention(embed_dim, num_heads)
            self.register_buffer("bucket", bucket_index(grid_size).clone(), persistent=False)
        elif position == "kprpe":
            self.keypoint_linear = KeypointRelativePosition(grid_size, num_keypoints, depth, num_heads, kprpe_sharing)
        self.norm = nn.LayerNorm(embed_dim)
        self.feature = nn.Sequential(
            nn.Linear(num_patches * embed_dim, embed_dim, bias=False),
            nn.BatchNorm1d(embed_dim, eps=2e-5),
            nn.Linear(embed_dim, num_features, bias=False),
            nn.BatchNorm1d(num_features, eps=2e-5),
        )
        self._initialise()

    def _initialise(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.mask_ratio > 0:
            nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear) and not isinstance(module, KeypointRelativePosition):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @torch.jit.ignore
    def position_tables(self) -> set[str]:
        """Names of the parameters of the relative positions, which start at zero and may learn at their own rate."""
        tables = ("lookup_table_weight", "keypoint_linear.weight", "keypoint_linear.bias")
        return {name for name, _ in self.named_parameters() if name.endswith(tables)}

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the position tables and tokens, which weight decay should leave alone."""
        return self.position_tables() | {"pos_embed", "mask_token"}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute each block's activations in the backward pass."""
        self.gradient_checkpointing = enable

    def forward(self, images: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        """Embed face crops.

        Args:
            images: (B, 3, img_size, img_size) float RGB in [-1, 1].
            keypoints: (B, 5, 2) float, xy in [0, 1] of the crop; needed by KPRPE, ignored by the other positions.

        Returns:
            (B, num_features) float32 embeddings, not normalised: the norm carries quality.

        Raises:
            ValueError: keypoints are missing, of a wrong shape, not finite or in pixels. In training on a GPU only the
                shape is checked, since a look at the values would stall the device.
        """
        if self.position == "kprpe":
            look = not torch.compiler.is_compiling() and not torch.jit.is_tracing()
            look = look and not (self.training and images.is_cuda)
            check_keypoints(keypoints, images.shape[0], self.keypoint_linear.num_keypoints, look)
        if self.fp16 and images.is_cuda:
            with torch.autocast("cuda", dtype=torch.float16):
                return self._embed(images, keypoints)
        return self._embed(images, keypoints)

    def _embed(self, images: torch.Tensor, keypoints: torch.Tensor | None) -> torch.Tensor:
        tokens = self.patch_embed(images) + self.pos_embed  # (B, N, D)
        tables = self.keypoint_linear(keypoints) if self.position == "kprpe" else None
        keep = self._draw_kept_patches(tokens) if self.training and self.mask_ratio > 0 else None
        if keep is not None:
            tokens = tokens.gather(1, keep.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
        for layer in range(len(self.blocks)):
            if self.gradient_checkpointing and self.training:
                tokens = checkpoint(self._run_block, tokens, layer, tables, keep, use_reentrant=False)
            else:
                tokens = self._run_block(tokens, layer, tables, keep)
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = self.norm(tokens.float())
        if keep is not None:
            everywhere = self.mask_token.to(tokens.dtype).expand(len(tokens), self.pos_embed.shape[1], -1)
            tokens = everywhere.scatter(1, keep.unsqueeze(-1).expand_as(tokens), tokens)
        return self.feature(tokens.flatten(1)).float()

    def _run_block(self, tokens: torch.Tensor, layer: int, tables: tuple | None, keep: torch.Tensor | None):
        """One block; the position argument is made here so that checkpointing need not store it."""
        position = None
        if self.position == "kprpe":
            device = tokens.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
            position = self.keypoint_linear.attention_bias(tables, layer, dtype)
        elif self.position == "irpe":
            position = self.bucket
        if keep is not None and position is not None:
            position = _between_kept(position, keep)
        return self.blocks[layer](tokens, attn_mask=position)

    def _draw_kept_patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """A random subset of the patches for every image: (B, kept) int64 indices."""
        batch, length, _ = tokens.shape
        kept = max(1, int(length * (1 - self.mask_ratio)))
        return torch.rand(batch, length, device=tokens.device).argsort(1)[:, :kept]


def _between_kept(position: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a (B, H, N, N) bias or an (N, N) bucket index for each image's kept patches (B, M)."""
    if position.dim() == 2:
        return position[keep[:, :, None], keep[:, None, :]]  # (B, M, M)
    heads, length, kept = position.shape[1], position.shape[-1], keep.shape[1]
    rows = position.gather(2, keep[:, None, :, None].expand(-1, heads, -1, length))
    return rows.gather(3, keep[:, None, None, :].expand(-1, heads, kept, -1))

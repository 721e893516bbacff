"""The ViT of InsightFace's arcface_torch, with absolute, contextual (iRPE) or keypoint-relative (KPRPE) positions.

No class token: all patch tokens are flattened into the embedding head. Parameter names are those of the published
arcface_torch and CVLface checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from .._timm import Block, PatchEmbed
from .interface import Backbone, own_half_precision
from .offset_attention import OffsetAttention
from .relative_position import ContextualAttention, KeypointRelativePosition, bucket_index, check_keypoints

POSITIONS = (None, "irpe", "kprpe")
BATCH_NORM_EPS = 2e-5  # of arcface_torch's embedding head


class VisionTransformer(Backbone):
    """A ViT that embeds a face crop; with ``position="kprpe"``, attention is relative to the face's keypoints.

    Args:
        img_size: side of the square input, pixels.
        patch_size: side of a patch, pixels; pixels beyond the last whole patch are not seen.
        embed_dim: D, width of a token.
        depth: L, number of blocks.
        num_heads: H, attention heads per block; divides ``embed_dim``.
        mlp_ratio: hidden width of the MLPs, as a multiple of ``embed_dim``.
        num_features: length of the embedding.
        num_classes: timm's name for it, which takes precedence; 0: no last layer, see :meth:`reset_classifier`.
        in_chans: channels of the images.
        position: None (absolute only), "irpe" or "kprpe".
        num_keypoints: K, 2 to 5 (KPRPE only).
        kprpe_sharing: which tables are shared: "none" (the published models), "layers", "heads" or "both".
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0.
        mask_ratio: share of the patches hidden from the blocks in training, in [0, 1).
        fp16: run under float16 autocast by itself on CUDA, as arcface_torch's networks do.
    """

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
        num_classes: int | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if position not in POSITIONS:
            raise ValueError(f"position must be one of {POSITIONS}, got {position!r}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
        self.img_size = img_size
        self.position = position
        self.needs_keypoints = position == "kprpe"
        self.mask_ratio = mask_ratio
        self.fp16 = fp16
        self.gradient_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans=in_chans, embed_dim=embed_dim)
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
            for block in self.blocks:
                block.attn = OffsetAttention(embed_dim, num_heads)
            self.keypoint_linear = KeypointRelativePosition(grid_size, num_keypoints, depth, num_heads, kprpe_sharing)
        self.norm = nn.LayerNorm(embed_dim)
        self.feature = nn.Sequential(
            nn.Linear(num_patches * embed_dim, embed_dim, bias=False),
            nn.BatchNorm1d(embed_dim, eps=BATCH_NORM_EPS),
            nn.Identity(),
            nn.Identity(),
        )
        self._set_classifier(num_features if num_classes is None else num_classes)
        self._initialize()

    def _set_classifier(self, num_classes: int) -> None:
        """The last layer of the head and its normalization, or none for 0."""
        width = self.feature[0].out_features
        self.num_classes, self.num_features = num_classes, num_classes or width
        self.feature[2] = nn.Linear(width, num_classes, bias=False) if num_classes else nn.Identity()
        self.feature[3] = nn.BatchNorm1d(num_classes, eps=BATCH_NORM_EPS) if num_classes else nn.Identity()
        self.pretrained_cfg = {
            "input_size": (self.patch_embed.proj.in_channels, self.img_size, self.img_size),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "interpolation": "bilinear",
            "num_classes": num_classes,
            "first_conv": "patch_embed.proj",
            "classifier": "feature.2",
        }

    def _initialize(self) -> None:
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
        """Names of the position tables and tokens, which should have no weight decay."""
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
            (B, num_features) float32 embeddings, not normalized: the norm carries quality.

        Raises:
            ValueError: keypoints are missing, of a wrong shape, not finite or in pixels. In training on a GPU only the
                shape is checked, since checking the values would stall the device.
        """
        return self.forward_head(self.forward_features(images, keypoints))

    def forward_features(self, images: torch.Tensor, keypoints: torch.Tensor | None = None) -> torch.Tensor:
        """All blocks and the last normalization; arguments as for :meth:`forward`.

        Returns:
            (B, N, D) float32 tokens of the N patches, row by row.
        """
        if self.position == "kprpe":
            look = not torch.compiler.is_compiling() and not torch.jit.is_tracing() and _has_values(keypoints)
            look = look and not (self.training and images.is_cuda)
            check_keypoints(keypoints, images.shape[0], self.keypoint_linear.num_keypoints, look)
        with own_half_precision(self.fp16, images):
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
        return tokens

    def forward_head(self, tokens: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Tokens of :meth:`forward_features` -> embeddings.

        Args:
            tokens: (B, N, D) float.
            pre_logits: leave the last layer and its normalization out.

        Returns:
            (B, num_features) float32; (B, D) with ``pre_logits``.
        """
        with own_half_precision(self.fp16, tokens):
            head = self.feature[:2] if pre_logits else self.feature
            return head(tokens.flatten(1)).float()

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The layer that turns what :meth:`forward_head` returns with ``pre_logits`` into embeddings."""
        return self.feature[2]

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the network a new last layer with random weights, or none.

        Args:
            num_classes: length of the new embeddings; 0: they are the inputs of the last layer, (B, D).
            global_pool: timm passes it; there is no pooling here, as all tokens go into the head.

        Raises:
            ValueError: ``global_pool`` is given.
        """
        if global_pool not in (None, ""):
            raise ValueError(f"global_pool must be None: all tokens go into the head, got {global_pool!r}")
        like = self.feature[0].weight
        self._set_classifier(num_classes)
        if num_classes:
            nn.init.trunc_normal_(self.feature[2].weight, std=0.02)
        self.feature[2:].to(like)

    def _run_block(self, tokens: torch.Tensor, layer: int, tables: tuple | None, keep: torch.Tensor | None):
        """One block; the position argument is made here so that checkpointing need not store it."""
        position = None
        if self.position == "kprpe" and OffsetAttention.can_run(tokens):
            return self.blocks[layer](tokens, attn_mask=self.keypoint_linear.lines(tables, layer, keep))
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


def _has_values(tensor: torch.Tensor | None) -> bool:
    """Whether there are values to check: tensors used in tracing have none."""
    return tensor is None or type(tensor) in (torch.Tensor, nn.Parameter)


def _between_kept(position: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Rows and columns of a (B, H, N, N) bias or an (N, N) bucket index for each image's kept patches (B, M)."""
    if position.dim() == 2:
        return position[keep[:, :, None], keep[:, None, :]]  # (B, M, M)
    heads, length, kept = position.shape[1], position.shape[-1], keep.shape[1]
    rows = position.gather(2, keep[:, None, :, None].expand(-1, heads, -1, length))
    return rows.gather(3, keep[:, None, None, :].expand(-1, heads, kept, -1))

"""What a decoder is made of: one frozen dataclass."""

import dataclasses

from ftdefense.core import errors
from ftdefense.models import rope

# Up to as many layers, the default is to unroll the scan. At D = 96, B = 64, L = 16 on
# two CPU cores a gradient step of 2 layers takes 5.3 ms unrolled and 6.6 ms scanned,
# and compiles no slower; of deep models the compile time matters more.
UNROLLED_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Shapes and switches of a decoder; hashable, so models compare by it.

    Attributes:
      vocab_size: V.
      width: D, of the residual stream.
      layers: N.
      heads: query heads.
      kv_heads: key and value heads; divides `heads`.
      mlp_width: F.
      head_dim: of one head; 0 stands for width / heads.
      max_length: longest sequence that `__call__` takes, in tokens.
      rope_theta: base of the rotary wavelengths.
      rope_scaling: how they are stretched, or None.
      norm_epsilon: added to the mean square in RMSNorm.
      tied: the head is the transposed embedding; there is no `lm_head`.
      attention_bias: q, k and v have a bias (Qwen2).
      output_bias: o has one (Llama and Qwen3 checkpoints with `attention_bias`).
      qk_norm: RMSNorm over each head of q and k before the rotation (Qwen3).
      sliding_window: tokens that a query sees, itself included; None: all before it.
      compute_dtype: "float32" or "bfloat16", of matrix products and of the residual
        stream; parameters, norms, rotations, softmax and logits are float32.
      remat: recomputes each block in the backward pass.
      unroll: layers per iteration of the scan; 0: all of them if they are at most
        `UNROLLED_LAYERS`, else one.
      init_scale: standard deviation of initial kernels and embeddings, as 0.02 in
        Llama; 0 stands for fan_in ** -0.5, which trains narrow models faster.
      residual_init: o and down start smaller by sqrt(2 N), as in GPT-2.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    head_dim: int = 0
    max_length: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: rope.RopeScaling | None = None
    norm_epsilon: float = 1e-5
    tied: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    compute_dtype: str = "float32"
    remat: bool = False
    unroll: int = 0
    init_scale: float = 0.0
    residual_init: bool = False

    def __post_init__(self):
        """Fills in `head_dim`; refuses what no decoder can be.

        Raises:
          UserError: naming the field.
        """
        if not self.head_dim:
            # Not a property: two ways to say one shape would be two configurations.
            object.__setattr__(self, "head_dim", self.width // self.heads)
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise errors.unknown(
                "compute_dtype", str(self.compute_dtype), ("float32", "bfloat16")
            )
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise errors.UserError(
                f"model: {self.heads} heads do not share {self.kv_heads} kv_heads "
                "evenly; set kv_heads to a divisor of heads."
            )
        if self.head_dim < 2 or self.head_dim % 2:
            raise errors.UserError(
                f"model: head_dim {self.head_dim} does not split into pairs, which "
                "rotary positions turn; set an even head_dim."
            )

    @property
    def scan_unroll(self) -> int:
        """Layers per iteration of the scan, at least one."""
        whole = self.layers <= UNROLLED_LAYERS
        return self.unroll or (self.layers if whole else 1)

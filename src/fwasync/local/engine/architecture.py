"""The built-in base models: their shapes, where each weight lies, and how they are born.

The decoder has the shape of Qwen3 (RMSNorm, grouped-query attention with normalised queries and
keys, rotary positions, SwiGLU, tied embeddings) and its weights carry the Hugging Face names, so
an exported snapshot can be opened by other tools.

Invariants
    * All weights of a model live in one flat vector. A `Layout` gives named views into it, so
      optimizer, norm, copy and accumulation are each one operation on one array.
    * q, k, v lie next to each other, and so do gate and up: each group is one matrix product.
    * A base model depends on its name only.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fwasync.local.engine.api import BaseModel, EngineError
from fwasync.local.tokenizer import STOP_TOKEN_IDS, VOCAB_SIZE

__all__ = (
    "ARCHITECTURES",
    "Architecture",
    "FloatArray",
    "LayerWeights",
    "Layout",
    "Weights",
    "find_architecture",
)

FloatArray = npt.NDArray[np.floating]

_INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Views of one layer's weights (or gradients); matrices are `[out, in]`."""

    input_norm: FloatArray
    qkv: FloatArray
    q_norm: FloatArray
    k_norm: FloatArray
    attention_out: FloatArray
    ffn_norm: FloatArray
    gate_up: FloatArray
    down: FloatArray


@dataclass(frozen=True, slots=True)
class Weights:
    """Views of a whole model; `unembedding` is `embedding` itself when the two are tied."""

    embedding: FloatArray
    layers: tuple[LayerWeights, ...]
    final_norm: FloatArray
    unembedding: FloatArray


@dataclass(frozen=True)
class Layout:
    """Names, shapes and places of the weights in a flat vector, in order."""

    shapes: dict[str, tuple[int, ...]]
    layers: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each weight starts."""
        offsets: dict[str, int] = {}
        position = 0
        for name, shape in self.shapes.items():
            offsets[name] = position
            position += math.prod(shape)
        return offsets

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def view(self, flat: FloatArray, first: str, last: str | None = None) -> FloatArray:
        """View one weight, or the rows of several neighbours from `first` to `last`."""
        shape = self.shapes[first]
        end_name = last or first
        end = self.offsets[end_name] + math.prod(self.shapes[end_name])
        return flat[self.offsets[first] : end].reshape(-1, *shape[1:])

    def named(self, flat: FloatArray) -> dict[str, FloatArray]:
        """View every weight by name."""
        return {name: self.view(flat, name) for name in self.shapes}

    def bind(self, flat: FloatArray) -> Weights:
        """View a flat vector as a model."""

        def layer(index: int) -> LayerWeights:
            prefix = f"model.layers.{index}."
            attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
            return LayerWeights(
                input_norm=self.view(flat, f"{prefix}input_layernorm.weight"),
                qkv=self.view(flat, f"{attention}q_proj.weight", f"{attention}v_proj.weight"),
                q_norm=self.view(flat, f"{attention}q_norm.weight"),
                k_norm=self.view(flat, f"{attention}k_norm.weight"),
                attention_out=self.view(flat, f"{attention}o_proj.weight"),
                ffn_norm=self.view(flat, f"{prefix}post_attention_layernorm.weight"),
                gate_up=self.view(flat, f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
                down=self.view(flat, f"{mlp}down_proj.weight"),
            )

        embedding = self.view(flat, "model.embed_tokens.weight")
        return Weights(
            embedding=embedding,
            layers=tuple(layer(index) for index in range(self.layers)),
            final_norm=self.view(flat, "model.norm.weight"),
            unembedding=(self.view(flat, "lm_head.weight") if "lm_head.weight" in self.shapes else embedding),
        )


@dataclass(frozen=True)
class Architecture:
    """The numbers that define a decoder."""

    name: str
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_size: int
    context: int
    vocab_size: int = VOCAB_SIZE
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6

    @property
    def heads_per_kv(self) -> int:
        """Query heads that share one key-value head."""
        return self.heads // self.kv_heads

    @cached_property
    def base_model(self) -> BaseModel:
        """The public description."""
        return BaseModel(
            name=self.name,
            vocab_size=self.vocab_size,
            max_context_length=self.context,
            hidden_size=self.hidden_size,
            parameters=self.layout(tied=True).size,
            stop_token_ids=STOP_TOKEN_IDS,
        )

    def layout(self, *, tied: bool) -> Layout:
        """Place the weights; `tied=False` adds an output head of its own at the end."""
        hidden, ffn, head = self.hidden_size, self.ffn_size, self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for index in range(self.layers):
            prefix = f"model.layers.{index}."
            shapes |= {
                f"{prefix}input_layernorm.weight": (hidden,),
                f"{prefix}self_attn.q_proj.weight": (self.heads * head, hidden),
                f"{prefix}self_attn.k_proj.weight": (self.kv_heads * head, hidden),
                f"{prefix}self_attn.v_proj.weight": (self.kv_heads * head, hidden),
                f"{prefix}self_attn.q_norm.weight": (head,),
                f"{prefix}self_attn.k_norm.weight": (head,),
                f"{prefix}self_attn.o_proj.weight": (hidden, self.heads * head),
                f"{prefix}post_attention_layernorm.weight": (hidden,),
                f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
                f"{prefix}mlp.up_proj.weight": (ffn, hidden),
                f"{prefix}mlp.down_proj.weight": (hidden, ffn),
            }
        shapes["model.norm.weight"] = (hidden,)
        if not tied:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return Layout(shapes, self.layers)

    def initial_weights(self) -> npt.NDArray[np.float32]:
        """Draw the base model's flat vector (tied layout): the same for a name, always.

        Matrices are normal with standard deviation 0.02; norms are one.
        """
        digest = hashlib.sha256(self.name.encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        layout = self.layout(tied=True)
        flat = np.ones(layout.size, np.float32)
        for weight in layout.named(flat).values():
            if weight.ndim == 2:
                weight[...] = rng.normal(0.0, _INIT_STD, weight.shape)
        return flat

    def huggingface_config(self, *, tied: bool) -> dict[str, object]:
        """Describe the model as a `config.json` of the Qwen3 family."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "dtype": "float32",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.context,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "attention_bias": False,
            "tie_word_embeddings": tied,
            "eos_token_id": STOP_TOKEN_IDS[0],
        }


_TINY = Architecture(
    name="fwasync/qwen3-tiny",
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    ffn_size=192,
    context=512,
)
_SMALL = Architecture(
    name="fwasync/qwen3-small",
    hidden_size=128,
    layers=4,
    heads=4,
    kv_heads=2,
    head_dim=32,
    ffn_size=384,
    context=1024,
)
ARCHITECTURES = {architecture.name: architecture for architecture in (_TINY, _SMALL)}
"""The built-in models by name."""


def find_architecture(name: str) -> Architecture:
    """Look up a built-in model; EngineError with the known names if there is none."""
    try:
        return ARCHITECTURES[name]
    except KeyError:
        known = ", ".join(ARCHITECTURES)
        raise EngineError(f"unknown base model {name!r}; this engine has: {known}") from None

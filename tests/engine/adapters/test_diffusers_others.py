"""Models of diffusers that no test of a pipeline has: what they need is a timestep, no name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine.adapters.diffusers_models import counted, noise
from tests.engine.compile.networks import distance
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stepfuse.engine.adapters.diffusers import accelerate, explain, restore

# float32 sums in another order: 1e-7 each, over a few hundred terms and some layers
REORDERED = 5e-6
WHOLE, PART = torch.tensor([17, 17]), torch.tensor([0.3, 0.3])
X, TEXT = noise(2, 4, 8, 8), noise(2, 5, 8, seed=1)
TOKENS = noise(2, 16, 4, seed=2)
SEEN = torch.ones(2, 5, dtype=torch.bool)
_SMALL = {"num_attention_heads": 2, "num_layers": 1}
_IMAGES = {**_SMALL, "in_channels": 4, "out_channels": 4, "patch_size": 2}
_STREAMS = {
    **_SMALL,
    "in_channels": 4,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "joint_attention_dim": 8,
}

# by class: the configuration, and the arguments of a call
COMPILED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "PriorTransformer": (
        {
            **_SMALL,
            "attention_head_dim": 4,
            "embedding_dim": 8,
            "num_embeddings": 5,
            "additional_embeddings": 4,
        },
        {
            "hidden_states": noise(2, 8),
            "timestep": torch.tensor(17),
            "proj_embedding": noise(2, 8, seed=3),
            "encoder_hidden_states": TEXT,
            "attention_mask": SEEN,
        },
    ),
    "UNetSpatioTemporalConditionModel": (
        {
            "block_out_channels": (32, 64),
            "down_block_types": (
                "CrossAttnDownBlockSpatioTemporal",
                "DownBlockSpatioTemporal",
            ),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "layers_per_block": 1,
            "num_attention_heads": (2, 4),
            "cross_attention_dim": 8,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12,
        },
        {
            "sample": noise(2, 3, 8, 8, 8),
            "timestep": torch.tensor(0.7),
            "encoder_hidden_states": noise(2, 1, 8),
            "added_time_ids": noise(2, 3),
        },
    ),
    "WanTransformer3DModel": (
        {
            **_IMAGES,
            "patch_size": (1, 2, 2),
            "attention_head_dim": 12,
            "text_dim": 8,
            "freq_dim": 16,
            "ffn_dim": 16,
            "rope_max_seq_len": 32,
        },
        {
            "hidden_states": noise(2, 4, 2, 8, 8),
            "timestep": WHOLE,
            "encoder_hidden_states": TEXT,
        },
    ),
    "LTXVideoTransformer3DModel": (
        {
            **_SMALL,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 8,
        },
        {
            "hidden_states": TOKENS,
            "timestep": WHOLE,
            "encoder_hidden_states": TEXT,
            "encoder_attention_mask": SEEN,
            "num_frames": 4,
            "height": 2,
            "width": 2,
        },
    ),
    "SanaTransformer2DModel": (
        {
            **_IMAGES,
            "patch_size": 1,
            "attention_head_dim": 4,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 4,
            "cross_attention_dim": 8,
            "caption_channels": 8,
            "sample_size": 8,
        },
        {"hidden_states": X, "timestep": WHOLE, "encoder_hidden_states": TEXT},
    ),
    "AuraFlowTransformer2DModel": (
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 8,
            "caption_projection_dim": 16,
            "pos_embed_max_size": 16,
        },
        {"hidden_states": X, "timestep": PART, "encoder_hidden_states": TEXT},
    ),
    "Flux2Transformer2DModel": (
        {**_STREAMS, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
        {
            "hidden_states": TOKENS,
            "timestep": PART,
            "encoder_hidden_states": TEXT,
            "img_ids": torch.zeros(2, 16, 4),
            "txt_ids": torch.zeros(2, 5, 4),
            "guidance": torch.ones(2),
        },
    ),
    "StableAudioDiTModel": (
        {
            **_SMALL,
            "sample_size": 4,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 4,
            "num_key_value_attention_heads": 2,
            "cross_attention_dim": 8,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 8,
        },
        {
            "hidden_states": noise(2, 4, 4),
            "timestep": PART,
            "encoder_hidden_states": TEXT,
            "global_hidden_states": noise(2, 1, 8),
        },
    ),
    "StableCascadeUNet": (
        {
            "block_out_channels": (8, 8),
            "num_attention_heads": (2, 2),
            "conditioning_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_num_layers_per_block": (1, 1),
            "up_num_layers_per_block": (1, 1),
            "down_blocks_repeat_mappers": (1, 1),
            "up_blocks_repeat_mappers": (1, 1),
            "block_types_per_layer": (
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            )
            * 2,
            "clip_text_in_channels": 8,
            "clip_text_pooled_in_channels": 8,
            "clip_image_in_channels": 8,
            "clip_seq": 2,
            "timestep_ratio_embedding_dim": 8,
        },
        {
            "sample": X,
            "timestep_ratio": PART,
            "clip_text_pooled": noise(2, 1, 8),
            "clip_text": TEXT,
            "clip_img": noise(2, 1, 8),
        },
    ),
}


def build(name: str, configuration: dict[str, Any]) -> Any:
    import diffusers
    from diffusers.models import unets

    torch.manual_seed(0)
    kind: Callable[..., Any] = getattr(diffusers, name, None) or getattr(unets, name)
    return kind(**configuration).eval()


def assert_near(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert distance(a, b) < REORDERED


@pytest.mark.parametrize("name", COMPILED)
@torch.no_grad()
def test_a_model_with_a_timestep_is_compiled(name: str) -> None:
    configuration, given = COMPILED[name]
    model = build(name, configuration)
    expected = model(**given)
    assert all(float(leaf.std()) > 1e-3 for leaf in tree_leaves(expected))
    accelerate(model)
    assert_near(model(**given), expected)
    assert counted(model, lambda: model(**given)) == 0
    assert "left out" not in explain(model)
    assert "no graph" not in explain(model)
    assert torch.equal(tree_leaves(restore(model)(**given))[0], tree_leaves(expected)[0])


@torch.no_grad()
def test_a_model_that_reads_its_mask_runs_itself_and_says_so() -> None:
    model = build(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 2,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": 8,
        },
    )
    mask = SEEN.clone()
    mask[0, 3:] = False
    given: dict[str, Tensor] = {
        "hidden_states": X,
        "timestep": PART,
        "encoder_hidden_states": TEXT,
        "encoder_attention_mask": mask,
    }
    expected = model(**given)
    accelerate(model)
    with pytest.warns(UserWarning, match="Lumina2.* was not compiled as a whole, no graph"):
        found = model(**given)
    assert_near(found, expected)
    given["encoder_attention_mask"] = SEEN  # other lengths: nothing of the first was kept
    found = model(**given)
    assert_near(found, type(model).forward(model, **given))
